"""What is trained on one process and on many, and how: the rows of the equivalence matrix (docs/parallel.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.architecture import AttentionTemperature, LlamaConfig, MoeConfig, tensor_shapes
from herd.model import Llama, initial_weight
from herd.train import Batch, Callback, StepRecord, TrainConfig, Trainer, Verdict, next_token_loss
from herd.train.trainer import LossFunction
from herd.train.world import World, current_world

ROWS, WIDTH, VOCABULARY = 8, 32, 128
STEPS = 3


def shape(**fields: Any) -> LlamaConfig:
    """A small Llama 3 with grouped queries, or with other fields."""
    small = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}
    return LlamaConfig(**{**small, "vocab_size": VOCABULARY, "context_length": 256, **fields})


MODELS = {
    "dense": shape(),
    "tied": shape(tied_embeddings=True),
    "moe": shape(
        generation="llama4",
        qk_norm=True,
        nope_interval=4,
        attention_chunk=12,
        attention_temperature=AttentionTemperature(floor_scale=8),
        moe=MoeConfig(n_experts=4, ffn_dim=48, interleave=2),
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, a way to split it, and on how many ranks; `fields` are those of TrainConfig."""

    model: str
    ranks: int
    parallel: dict[str, Any]
    slow: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As a row of the table."""
        shown = {k: v for k, v in self.parallel.items() if k != "shard"}
        words = [f"{axis} {ranks}" for axis, ranks in shown.items() if not isinstance(ranks, bool)]
        words += [("" if on else "no ") + name for name, on in shown.items() if isinstance(on, bool)]
        known = self.parallel.get("tp", 1) * self.parallel.get("cp", 1) * self.parallel.get("pp", 1)
        dp = self.ranks // known
        if dp > 1:
            words.append(f"{'fsdp' if self.parallel.get('shard') or self.parallel.get('ep') else 'dp'} {dp}")
        words += [f"{name} {value}" for name, value in self.fields.items()]
        return f"{self.model}: {', '.join(words)}"


class Rows:
    """Random packed documents with a tenth of the targets left out, the same for every number of ranks."""

    def __init__(self, micro_batch: int, world: World) -> None:
        self._micro_batch, self._world = micro_batch, world

    def batch(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCABULARY, (ROWS, WIDTH + 1), generator=generator)
        documents = torch.randint(0, 100, (ROWS, WIDTH), generator=generator).gt(90).cumsum(1)
        weights = torch.randint(0, 10, (ROWS, WIDTH), generator=generator).gt(0).float()
        share = ROWS // self._world.data_size
        mine = slice(self._world.data_rank * share, (self._world.data_rank + 1) * share)
        whole = [x[mine].contiguous() for x in (tokens[:, :-1], tokens[:, 1:], documents, weights)]
        return [Batch(*parts) for parts in zip(*(x.split(self._micro_batch) for x in whole), strict=True)]

    def fingerprint(self) -> str:
        return "rows"


class Seen(Callback):
    """What every step was: loss, norm, tokens, and all gradients, whole."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, int, dict[str, Tensor]]] = []

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        gradients = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                gradients[name] = whole / record.supervised
        self.steps.append((record.loss, record.grad_norm, record.tokens, gradients))
        return Verdict.APPLY


def trainer(
    case: Case, out: Path, callbacks: list[Callback], loss_fn: LossFunction[Batch] = next_token_loss, **fields: Any
) -> Trainer[Batch]:
    """The run of a case on the ranks there are; `fields` are those of TrainConfig.

    One process has the whole model from the beginning; several ranks split its shapes and fill their own parts.
    """
    settings: dict[str, Any] = {
        "steps": STEPS,
        "seq_len": WIDTH,
        "batch_size": ROWS,
        "micro_batch": 2,
        "precision": "fp32",
        "compile": "off",
        "checkpoint_seconds": 0,
        "lr": 1e-3,
        "eps": 1e-6,  # small gradients of either sign are rounding: AdamW without it would make whole steps of them
    }
    config = TrainConfig(**{**settings, **case.fields, **fields}, parallel=case.parallel)
    world = current_world(config.parallel)
    rows, shape = Rows(config.micro_batch_rows, world), MODELS[case.model]
    if world.size == 1:
        model = Llama(shape)
        model.init_weights(0)
        return Trainer(model, loss_fn, rows, config, out, callbacks, world=world)
    shapes = tensor_shapes(shape)

    def weights(name: str) -> Tensor:
        name = name if name in shapes else "embed.weight"
        return initial_weight(shape, name, shapes[name], 0)

    with torch.device("meta"):
        model = Llama(shape)
    return Trainer(model, loss_fn, rows, config, out, callbacks, world=world, weights=weights)


def run(case: Case, out: Path) -> list[tuple[float, float, int, dict[str, Tensor]]]:
    """Three steps of a case; clipping is in force, since gradients of random weights are longer than 1."""
    seen = Seen()
    loop = trainer(case, out, [seen])
    for _ in range(STEPS):
        loop.train_step()
    return seen.steps


def _cases(ranks: int, model: str, *splits: dict[str, Any], slow: bool = False, **fields: Any) -> list[Case]:
    return [Case(model, ranks, split, slow, fields) for split in splits]


def _chunked(schedule: str, **more: Any) -> dict[str, Any]:
    return {"pp": 2, "virtual": 2, "schedule": schedule, **more}


def _ring(**more: Any) -> dict[str, Any]:
    return {"cp": 2, "context": "ring", **more}


def _replicas(**more: Any) -> dict[str, Any]:
    return {"replicas": 2, "shard": True, **more}


_OTHER_SCHEDULES = ("interleaved", "dualpipev", "looped-bfs", "interleaved-zero-bubble")

CASES = [
    # every axis
    *_cases(2, "dense", {}, {"shard": True}, {"tp": 2}, {"cp": 2}, {"cp": 2, "context": "ring"}, {"pp": 2}),
    *_cases(2, "tied", {"shard": True}, {"tp": 2}, {"cp": 2}, {"pp": 2}),
    *_cases(2, "moe", {"shard": True}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2}),
    # what an axis can be told
    *_cases(2, "dense", {"shard": True, "recompute": "selective"}, _chunked("interleaved", contiguous=3)),
    *_cases(2, "dense", {"shard": True, "reshard": True}, {"shard": True, "reduce_each": False}, slow=True),
    *_cases(2, "dense", {"shard": True, "recompute": "full"}, {"pp": 2, "schedule": "gpipe"}, slow=True),
    *_cases(2, "dense", _chunked("interleaved"), _chunked("looped-bfs"), _chunked("dualpipev"), slow=True),
    *_cases(2, "dense", _chunked("interleaved-zero-bubble"), _chunked("zbv"), slow=True),
    *_cases(2, "tied", _chunked("zbv")),
    *_cases(2, "tied", _chunked("interleaved", contiguous=4), _chunked("interleaved", virtual=3), slow=True),
    *_cases(2, "moe", _chunked("interleaved"), {"shard": True, "recompute": "full"}, slow=True),
    # more tensor ranks than key heads; rings within and between nodes
    *_cases(4, "dense", {"tp": 4}),
    *_cases(4, "dense", {"cp": 4, "context": "ring", "inner_ring": 2}, slow=True),
    *_cases(4, "dense", {"cp": 4}, {"cp": 4, "context": "ring"}, {"pp": 4}, slow=True),
    # every pair of axes
    *_cases(4, "dense", {"tp": 2, "shard": True}),
    *_cases(4, "dense", {"tp": 2, "cp": 2}, {"tp": 2, "pp": 2}, {"cp": 2, "shard": True}, slow=True),
    *_cases(4, "dense", {"cp": 2, "pp": 2}),
    *_cases(4, "dense", {"pp": 2, "shard": True}, slow=True),
    *_cases(4, "dense", {"replicas": 2, "shard": True}),
    *_cases(4, "moe", {"ep": 2, "tp": 2}),
    *_cases(4, "moe", {"ep": 2, "pp": 2}, slow=True),
    *_cases(4, "moe", {"ep": 2, "cp": 2}, {"ep": 2, "shard": True}, slow=True),
    *_cases(4, "moe", {"ep": 4}, {"ep": 2, "replicas": 2}, {"tp": 2, "cp": 2}, {"tp": 2, "pp": 2}, slow=True),
    *_cases(4, "moe", {"cp": 2, "pp": 2}, {"tp": 2, "cp": 2, "recompute": "full"}, slow=True),
    *_cases(4, "tied", {"tp": 2, "pp": 2}, {"tp": 2, "shard": True}, {"pp": 2, "shard": True}, slow=True),
    *_cases(4, "tied", {"tp": 2, "cp": 2}, {"cp": 2, "pp": 2}, {"cp": 2, "shard": True}, slow=True),
    # rings and pipelines of several chunks with every other axis; the axes with whole models, and with experts on all
    *_cases(4, "dense", _ring(shard=True), slow=True),
    *_cases(4, "dense", _ring(tp=2), _ring(pp=2), _ring(**_chunked("zbv")), {"tp": 2}, {"cp": 2}, {"pp": 2}, slow=True),
    *_cases(4, "dense", _chunked("zbv", shard=True), slow=True, micro_batch=1),
    *_cases(4, "dense", *(_chunked(name, shard=True) for name in _OTHER_SCHEDULES), slow=True, micro_batch=1),
    *_cases(4, "dense", _chunked("zbv"), slow=True, micro_batch=1),
    *_cases(4, "dense", _chunked("interleaved", tp=2), _chunked("zbv", tp=2), _chunked("dualpipev", tp=2), slow=True),
    *_cases(4, "dense", _chunked("interleaved", cp=2), _chunked("zbv", cp=2), slow=True),
    *_cases(4, "tied", _chunked("zbv", shard=True), _chunked("zbv", tp=2), _chunked("zbv", cp=2), slow=True),
    *_cases(4, "moe", {"tp": 2, "shard": True}, slow=True),
    *_cases(4, "moe", {"cp": 2, "shard": True}, {"pp": 2, "shard": True}, slow=True),
    *_cases(4, "moe", _ring(tp=2), _ring(pp=2), _ring(ep=2), _chunked("zbv", ep=2), slow=True),
    # replicas with every other axis
    *_cases(8, "dense", _replicas(tp=2), _replicas(cp=2), slow=True),
    *_cases(8, "dense", _replicas(pp=2), _chunked("zbv", **_replicas()), slow=True, micro_batch=1),
    *_cases(8, "dense", _replicas(**_ring()), slow=True),
    *_cases(4, "moe", _replicas(), slow=True),
    *_cases(8, "moe", _replicas(cp=2), _replicas(tp=2), slow=True),
    # three axes at once
    *_cases(8, "dense", {"tp": 2, "cp": 2, "pp": 2}, {"tp": 2, "pp": 2, "shard": True}, slow=True),
    *_cases(8, "moe", {"ep": 2, "tp": 2, "pp": 2}, {"ep": 2, "tp": 2, "cp": 2}, slow=True),
]
