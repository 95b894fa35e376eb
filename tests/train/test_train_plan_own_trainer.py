"""The planner's bytes beside those that Herd's own trainer holds: on two ranks, and of one layer."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from herd.architecture import AttentionTemperature, LlamaConfig, MoeConfig, tensor_shapes
from herd.model import Llama, initial_weight
from herd.train import Batch, Callback, StepRecord, TrainConfig, Trainer, Verdict, losses, next_token_loss
from herd.train.parallel.context import ContextAttention, ShardRanges
from herd.train.parallel.partial_attention import Keys
from herd.train.plan import Job, Layout, Settings, own_trainer
from herd.train.plan.memory import memory
from herd.train.plan.parts import layer
from herd.train.recompute import _policy, recompute
from herd.train.world import current_world
from tests.train.parallel.launch import launch

ROWS, WIDTH = 8, 32
SHAPE = LlamaConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=128)
SHARDINGS: dict[str, dict[str, Any]] = {
    "optimizer": {"shard": True, "reduce_each": False},
    "gradients": {"shard": True},
    "parameters": {"shard": True, "reshard": True},
}


class Rows:
    """Rows of random tokens, two a micro-batch, the same on every rank."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def batch(self, step: int) -> list[Batch]:
        tokens = torch.randint(0, SHAPE.vocab_size, (self._rows, WIDTH + 1))
        documents, weights = torch.zeros(self._rows, WIDTH, dtype=torch.int64), torch.ones(self._rows, WIDTH)
        whole = (tokens[:, :-1], tokens[:, 1:], documents, weights)
        return [Batch(*parts) for parts in zip(*(x.split(2) for x in whole), strict=True)]

    def fingerprint(self) -> str:
        return "rows"


class Gradients(Callback):
    """Bytes of the gradients that a rank has when a step's are complete."""

    n_bytes = 0

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        self.n_bytes = held(p.grad for p in trainer.model.parameters() if p.grad is not None)
        return Verdict.APPLY


def local(x: Any) -> Tensor:
    """A rank's part of a tensor."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part.detach()


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of a rank's parts of them."""
    return sum(local(x).nbytes for x in tensors)


def whole(model: nn.Module) -> int:
    """Bytes of the weights that are gathered at the moment."""
    return sum(p.nbytes for p in model.parameters() if not hasattr(p, "to_local"))


def alive() -> int:
    """Bytes of all tensors that there are, and of their gradients; numbers left out."""
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, Tensor) and not hasattr(x, "to_local") and x.ndim > 0]
    found += [x.grad for x in found if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


@contextmanager
def saving(module: nn.Module, into: dict[int, int], besides: Callable[[], set[int]]) -> Iterator[None]:
    """Collects what calls of `module` save for the backward pass, storage by storage, but weights and `besides`."""
    alive_until_then = []

    def pack(x: Tensor) -> Tensor:
        storage = local(x).untyped_storage()
        if storage.data_ptr() not in besides() | {local(p).untyped_storage().data_ptr() for p in module.parameters()}:
            into[storage.data_ptr()] = storage.nbytes()
            alive_until_then.append(x)
        return x

    hooks: list[Any] = []

    def begin(*_: Any) -> None:
        hooks.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
        hooks[-1].__enter__()

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(lambda *_: hooks[-1].__exit__())]
    yield
    for handle in handles:
        handle.remove()


def measure(rank: int, out: Path) -> None:
    """What one rank of two holds, by sharding; and what a layer of it keeps with tensor parallelism."""
    found = {name: _sharded(out / name, parallel) for name, parallel in SHARDINGS.items()}
    (out / f"{rank}.json").write_text(json.dumps(found | {"tensor": _tensor(out / "tensor")}))


def _trainer(
    out: Path, parallel: dict[str, Any], loss: Callable[..., Any], callbacks: list[Callback]
) -> Trainer[Batch]:
    config = TrainConfig(
        steps=2, seq_len=WIDTH, batch_size=ROWS, micro_batch=2, precision="bf16", compile="off", checkpoint_seconds=0,
        parallel=parallel,
    )  # fmt: skip
    world, shapes = current_world(config.parallel), tensor_shapes(SHAPE)
    with torch.device("meta"):
        model = Llama(SHAPE)
    return Trainer(
        model, loss, Rows(ROWS // world.data_size), config, out, callbacks, world=world,
        weights=lambda name: initial_weight(SHAPE, name, shapes[name], 0),
    )  # fmt: skip


def _sharded(out: Path, parallel: dict[str, Any]) -> dict[str, int]:
    at: list[int] = []

    def loss(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
        if len(at) < 2:
            at.append(alive())
        return next_token_loss(model, batch)

    gradients, gathered = Gradients(), dict[str, int]()
    loop = _trainer(out, parallel, loss, [gradients])
    last, inside = loop.model.norm, loop.model.layers[1].ffn_norm
    last.register_forward_pre_hook(lambda *_: gathered.update(after_blocks=whole(loop.model)))
    inside.register_forward_pre_hook(lambda *_: gathered.update(inside_a_block=whole(loop.model)))
    loop.train_step()
    states = [x for state in loop.optimizer.state(loop.model).values() for x in state.values()]
    moments = [x for x in states if isinstance(x, Tensor) and x.ndim > 0]
    return {
        "parameters": held(loop.model.parameters()),
        "moments": held(moments),
        "gradients": gradients.n_bytes,
        "between_micro_batches": at[1] - at[0],
        **gathered,
    }


def _tensor(out: Path) -> dict[str, Any]:
    """Bytes that a layer keeps, and the precisions in which states are gathered and results scattered."""
    from herd.train.parallel import tensor

    loop = _trainer(out, {"tp": 2}, next_token_loss, [])
    sent: dict[str, set[str]] = {"gather": set(), "scatter": set()}
    inside: list[bool] = []
    gather, scatter = tensor.funcol.all_gather_single_autograd, tensor.funcol.reduce_scatter_single_autograd

    def noting(name: str, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if inside:
                sent[name].add(str(x.dtype))
            return exchange(x, *args, **kwargs)

        return run

    tensor.funcol.all_gather_single_autograd = noting("gather", gather)
    tensor.funcol.reduce_scatter_single_autograd = noting("scatter", scatter)
    block, kept = loop.model.layers[1], dict[int, int]()
    block.register_forward_pre_hook(lambda *_: inside.append(True))
    block.register_forward_hook(lambda *_: inside.clear())
    places: set[int] = set()
    block.register_forward_pre_hook(lambda _, inputs: places.update(_storages(inputs[1])))
    with saving(block, kept, lambda: places), loop._autocast():
        loop.loss_fn(loop.model, Rows(2).batch(0)[0])
    return {"kept": sum(kept.values()), **{name: sorted(dtypes) for name, dtypes in sent.items()}}


def _storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tuple(tree)) if isinstance(x, Tensor)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("torch.distributed")
    out = tmp_path_factory.mktemp("ranks")
    launch(2, "tests.train.test_train_plan_own_trainer:measure", out, timeout=600)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_hold_what_is_planned_to_the_byte(ranks: list[dict[str, Any]], sharding: Any) -> None:
    plan = memory(Job(SHAPE, WIDTH, WIDTH * ROWS, trainer="herd"), Layout(1, 1, 1, 2), Settings(2, sharding=sharding))
    block = 2 * layer(SHAPE, 1, 1, False).shared
    for rank in ranks:
        found = rank[sharding]
        own = found["parameters"]
        assert plan.optimizer == own + found["moments"] and found["moments"] == 2 * own
        assert found["gradients"] == own
        if sharding == "optimizer":  # whole until the last micro-batch, and then a part
            assert plan.gradients == found["between_micro_batches"] + found["gradients"]
        else:
            assert found["between_micro_batches"] == own < plan.gradients
        if sharding == "parameters":  # in the forward pass on a GPU, the next block is gathered meanwhile
            assert plan.weights == found["inside_a_block"] + block == found["after_blocks"] + 2 * block
        else:
            assert plan.weights == found["after_blocks"]


def test_a_layer_of_tensor_parallel_ranks_keeps_what_is_planned(ranks: list[dict[str, Any]]) -> None:
    planned = own_trainer.kept(SHAPE, Layout(2, 1, 1, 1), False)["none"] * 2 * WIDTH
    for rank in ranks:
        assert rank["tensor"]["kept"] == pytest.approx(planned, rel=0.02)
        assert rank["tensor"]["gather"] == ["torch.float32"] and rank["tensor"]["scatter"] == ["torch.bfloat16"]


DENSE = LlamaConfig(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, vocab_size=64)
MIXTURE = LlamaConfig(
    dim=128, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, vocab_size=64, generation="llama4",
    qk_norm=True, attention_chunk=64, attention_temperature=AttentionTemperature(floor_scale=8), nope_interval=4,
    moe=MoeConfig(n_experts=4, ffn_dim=256, interleave=1),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "within"), [(DENSE, 0.01), (MIXTURE, 0.02)], ids=["dense", "mixture"])
@pytest.mark.parametrize("what", ["none", "full"])
def test_a_layer_keeps_what_is_planned(shape: LlamaConfig, within: float, what: Any) -> None:
    model = Llama(shape)
    model.init_weights(0)
    block = model.layers[0].to(torch.bfloat16)  # as it is gathered
    recompute(model, what)
    x_BSD = torch.randn(2, 128, shape.dim, requires_grad=True)
    places, kept = model.places(torch.zeros(2, 128, dtype=torch.int64)), dict[int, int]()
    with saving(block, kept, lambda: _storages(places)), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        block(x_BSD, places)
    not_compiled = Layout(1, 2, 1, 1)  # context ranks keep the same of their tokens
    planned = own_trainer.kept(shape, not_compiled, shape.moe is not None)[what]
    assert sum(kept.values()) / 256 == pytest.approx(planned, rel=within)


def test_context_ranks_compute_attention_again() -> None:
    """Neither its scores nor its result are kept, and no product is dear enough."""
    shape = LlamaConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=64, context_length=256
    )

    class Alone:
        def forward(self, kv: torch.Tensor) -> Iterator[Keys]:
            yield Keys(0, kv[0], kv[1])

        def backward(self, kv: torch.Tensor, gradients: Any) -> torch.Tensor:
            return torch.stack(gradients(Keys(0, kv[0], kv[1])))

    queries = torch.randn(1, 256, 4, 16, requires_grad=True)
    keys, values = (torch.randn(1, 256, 2, 16, requires_grad=True) for _ in range(2))
    places = torch.arange(256).unsqueeze(0)
    ranges = ShardRanges(torch.zeros_like(places), places, ((0, 128), (0, 256)))
    keeping, _ = create_selective_checkpoint_contexts(_policy)
    with keeping:
        ContextAttention(Alone())(queries, keys, values, ranges)
    assert not [op for op, found in keeping.storage.items() if any(hasattr(one, "get_val") for one in found.values())]
    with_context, without = (own_trainer.kept(shape, Layout(1, cp, 1, 1), False)["selective"] for cp in (2, 1))
    assert without - with_context == 2 * 4 * 16 + 4 * 4, "the result in bf16, log-sum-exp in fp32"


def test_the_losses_chunks_are_those_of_the_trainer() -> None:
    assert own_trainer.GPU_CHUNK_LOGITS == losses.GPU_CHUNK_LOGITS
    assert own_trainer.MIN_CHUNK_ROWS == losses.MIN_CHUNK_ROWS
