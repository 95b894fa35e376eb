"""The same recipe for a laptop and a minute: `herd run RECIPE --shrink`. A pure function of the recipe's data.

What is changed, and nothing else:

name       NAME-shrunk; runs of other recipes that it begins with, runs/OTHER, are runs/OTHER-shrunk.
text       The corpus is one text, this Python's standard library unless another folder is given; 1 % is held out.
           Every source of a mixture gets a part of it, by the first letters of names; weights stay.
vocabulary 512 ids, or what the run that it comes from has.
shapes     A model more than 256 wide has 1/64 of the width and feed-forward width, 1/4 of the heads (of both kinds, so
           their ratio stays), heads of 1/16 of the width, 1/8 of the layers (2 to 4, whole periods of mixtures and NoPE
           layers), and 4 experts where it had more. What kind of layer, embedding and RoPE scaling it has stays.
lengths    The longest rows have 256 tokens or about so; whatever else is counted in tokens of a row or a context
           (shorter rows, the context, the one before RoPE scaling, attention chunks) is divided alike.
batches    4 rows in the largest, the others in proportion, at least one for every rank that takes rows.
time       Every stretch between two changes (warm-up ends, rows or batches grow, weights change, annealing begins) has
           the same number of steps, 2 or more; together 12 or more. A change beyond the last step is left out.
layout     Two ranks for every axis that has several, as far as the ranks that are there go round; the rest is DP.
           A pipeline's schedule stays where there are two stages, with two chunks if it had several.
measuring  Two probes of 2,000 tokens, a line for every step, no time limits; some dozen exercises and rows to prune by.
extending  To 1,024 tokens in 4 steps; what a model that small must still read and find is not asked, nor after phases.

Learning rates, optimiser, schedules, precision, packing and infilling stay as they are. (Only documents that fit a row
are infilled; of the standard library's, some four in a hundred do.)
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.architecture import LlamaConfig
from herd.config import parse_config
from herd.corpus import STDLIB
from herd.errors import UsageError
from herd.pretrain.config import PretrainConfig, Size
from herd.pretrain.phases import Phases
from herd.recipe.shape import ModelShape, shape_of
from herd.train.config import TrainConfig
from herd.train.parallel.config import ParallelConfig
from herd.train.schedule import warmup_steps

SHRUNK = "-shrunk"
"""What the names of shrunk recipes, and so of their runs, end with."""
RUN = re.compile(r"runs/[^/]+")
"""How a recipe names the run of another one."""
_STEPS = 12
_ROW = 256
_ROWS = 4
_SMALL = 256
_IDS = 512
_HELDOUT = 0.01
_SFT: dict[str, int] = {"exercises": 100, "max_turns": 1}
_SFT_STEPS = 8
_MOST: dict[str, dict[str, int]] = {
    "base": {"evaluations": 2, "probe_tokens": 2000},
    "extend": {"to": 1024, "steps": 4, "batch_size": 1, "probe_tokens": 2000, "lengths": 2, "depths": 2, "samples": 1},
    "evaluate": {
        "exercises": 20,
        "shots": 1,
        "heldout_bytes": 5000,
        "samples": 2,
        "sample_tokens": 16,
        "max_tokens": 8,
    },
    "quantise": {"heldout_bytes": 2000},
}
"""Fields of stages that are lowered to these values."""
_UNASKED = {"tolerance": None, "needles": 0.0}
"""Of what a longer context must not cost and must bring."""

Values = Mapping[str, Any]
Lengths = Callable[[int], int]


def shrunk(data: Values, where: str, *, text: str = STDLIB, ranks: int = 1) -> dict[str, Any]:
    """The data of a recipe (name, stages and what else its file has), made small. `where` is named in errors.

    Raises UsageError for a recipe whose `base` stage is not valid and for a `text` that is no folder.
    """
    data = _references(copy.deepcopy(dict(data)))
    stages: dict[str, Any] = {name: values or {} for name, values in data["stages"].items() if values is not False}
    label = _label(text)
    for name, most in _MOST.items():
        if name in stages:
            stages[name] = {**stages[name], **_lowered(stages[name], most)}
    if "extend" in stages:
        stages["extend"] |= _UNASKED
    if "corpus" in stages:
        stages["corpus"] = {**stages["corpus"], "sources": [text], "heldout_fraction": _HELDOUT}
    if "tokenizer" in stages and stages["tokenizer"].get("file") is None:
        stages["tokenizer"] = {**stages["tokenizer"], "vocab_size": _IDS, "n_specials": 16}
    if "base" in stages:
        base = _Base(stages["base"], f"{where}: base", ranks)
        stages["base"] = {**base.values(stages["base"]), "sources": _sources(base.config, label)}
        if (promote := stages["base"].get("promote")) is not None:
            short = promote.get("short")
            stages["base"]["promote"] = promote | _UNASKED | {"short": short and base.lengths(short)}
        if "sft" in stages:
            stages["sft"] = base.tuning(stages["sft"])
    return {**data, "name": f"{data.get('name', Path(where).stem)}{SHRUNK}", "stages": stages}


class _Base:
    """The pretraining stage as it was and what it becomes: `row` tokens in the longest rows."""

    def __init__(self, values: Values, where: str, ranks: int) -> None:
        known = {name: value for name, value in values.items() if name in PretrainConfig.model_fields}
        self.config = parse_config(PretrainConfig, known, where, fix="herd fields base")
        longest = self.config.longest_row
        lengths = [self.config.train.seq_len, *(phase.seq_len for phase in self.config.phases)]
        parts = math.lcm(*(longest // length for length in lengths))
        self.row = longest if longest <= _ROW else parts * max(4, _ROW // parts)
        self.lengths: Lengths = lambda tokens: max(1, -(-tokens * self.row // longest))
        self.model = _model(values.get("model") or {}, where, self.lengths)
        self._ranks = ranks
        self.parallel = _layout(self.config.train.parallel, self.model, ranks)

    def values(self, values: Values) -> dict[str, Any]:
        """The stage's values."""
        config, train = self.config, self.config.train
        points = self._points()
        each = max(2, -(-_STEPS // (len(points) + 1)))
        step = {tokens: (number + 1) * each for number, tokens in enumerate(points)}
        steps = (len(points) + 1) * each
        first = {"seq_len": self.lengths(train.seq_len), "batch_size": self._rows(train.batch_size)}
        phases: list[Size] = []
        for phase in config.phases:
            if phase.from_tokens in step:
                sizes = Phases(**first, later=phases)
                begins = sizes.tokens_before(step[phase.from_tokens])
                row, rows = self.lengths(phase.seq_len), self._rows(phase.batch_size)
                phases.append(Size(from_tokens=begins, seq_len=row, batch_size=rows))
        sizes = Phases(**first, later=phases)
        mix = [
            {"from_tokens": sizes.tokens_before(step[change.from_tokens]), "weights": change.weights}
            for change in config.mix
            if change.from_tokens in step
        ]
        annealed, warm = self._anneals(), self._warm()
        loop = {
            **(values.get("train") or {}),
            **first,
            "steps": steps,
            "warmup": step.get(warm, steps) if warm else 0,
            "anneal": steps - step.get(annealed, 0) if train.anneal else 0,
            "schedule_steps": train.schedule_steps and round(train.schedule_steps / train.steps * steps),
            "log_every": 1,
            "checkpoint_every": each if train.checkpoint_every else 0,
            **self._shared(train),
        }
        if (adapt := values.get("adapt")) is not None:
            values = {
                **values,
                "adapt": {**adapt, **_lowered(adapt, {"calibration_rows": 16, "calibration_tokens": self.row})},
            }
        return {
            **values,
            "model": shape_of(self.model),
            "phases": [phase.model_dump() for phase in phases],
            "mix": mix,
            "max_minutes": None,
            "train": loop,
        }

    def tuning(self, values: Values) -> dict[str, Any]:
        """Values of the stage that tunes the model."""
        given = values.get("train") or {}
        loop = {
            **given,
            "steps": _SFT_STEPS,
            "seq_len": min(given.get("seq_len", self.row), self.model.context_length),
            "batch_size": self._rows(self.config.train.batch_size),
            "log_every": 1,
            "warmup": min(given.get("warmup", 0.02), 1),
            **self._shared(parse_config(TrainConfig, given, "sft", fix="herd fields sft")),
        }
        return {**values, **_lowered(values, _SFT), "epochs": None, "max_minutes": None, "train": loop}

    def _points(self) -> list[int]:
        """Where something changes: tokens read before it, inside the run, in order."""
        changes = [phase.from_tokens for phase in self.config.phases]
        changes += [change.from_tokens for change in self.config.mix]
        last = self.config.sizes().tokens_before(self.config.train.steps)
        return sorted({point for point in (*changes, self._warm(), self._anneals()) if 0 < point < last})

    def _warm(self) -> int:
        train = self.config.train
        return self.config.sizes().tokens_before(warmup_steps(train.steps - train.anneal, train))

    def _anneals(self) -> int:
        train = self.config.train
        return self.config.sizes().tokens_before(train.steps - train.anneal) if train.anneal else 0

    def _rows(self, batch_size: int) -> int:
        """Rows of a step: every DP rank as many, and as many micro-batches as there are pipeline ranks."""
        parallel = self.parallel
        largest = max([self.config.train.batch_size, *(phase.batch_size for phase in self.config.phases)])
        rows = max(1, round(min(_ROWS, largest) * batch_size / largest))
        tp, cp, pp = (int(parallel[axis]) for axis in ("tp", "cp", "pp"))
        return self._ranks // (tp * cp) * -(-rows // pp)

    def _shared(self, train: TrainConfig) -> dict[str, Any]:
        """How ranks and micro-batches share a step; the micro-batch's size stays open where it was."""
        whole = train.micro_batch is None and self.parallel["pp"] == 1
        return {"parallel": self.parallel, "micro_batch": None if whole else 1}


def _model(values: Values, where: str, lengths: Lengths) -> LlamaConfig:
    """The shape; its vocabulary is the tokenizer's."""
    config = parse_config(ModelShape, values, f"{where}: model", fix="herd fields base.model").to_llama(_IDS)
    scaling, temperature, moe = config.rope_scaling, config.attention_temperature, config.moe
    config = dataclasses.replace(
        config,
        context_length=lengths(config.context_length),
        rope_scaling=scaling and dataclasses.replace(scaling, original_context=lengths(scaling.original_context)),
        attention_chunk=config.attention_chunk and lengths(config.attention_chunk),
        attention_temperature=temperature
        and dataclasses.replace(temperature, floor_scale=lengths(temperature.floor_scale)),
    )
    if config.dim <= _SMALL:
        return config
    heads = next(share for share in (4, 2, 1) if config.n_heads % share == config.n_kv_heads % share == 0)
    period = math.lcm(config.nope_interval or 1, moe.interleave if moe else 1)
    layers = min(4, max(2, config.n_layers // 8))
    return dataclasses.replace(
        config,
        dim=max(8, config.dim // 64),
        ffn_dim=max(8, config.ffn_dim // 64),
        n_heads=config.n_heads // heads,
        n_kv_heads=config.n_kv_heads // heads,
        head_dim=max(4, config.head_dim // 32 * 2),
        n_layers=period * -(-layers // period),
        moe=moe
        and dataclasses.replace(
            moe, n_experts=min(4, moe.n_experts), top_k=min(4, moe.top_k), ffn_dim=max(8, moe.ffn_dim // 64)
        ),
    )


def _layout(full: ParallelConfig, model: LlamaConfig, ranks: int) -> dict[str, Any]:
    """Two ranks an axis, as long as there are any, innermost axis first."""
    left, axes = ranks, {"tp": 1, "pp": 1, "cp": 1}
    for axis in axes:
        if getattr(full, axis) > 1 and left % 2 == 0 and (axis != "tp" or model.n_heads % 2 == 0):
            axes[axis], left = 2, left // 2
    sharing = left * axes["cp"]
    experts = model.moe.n_experts if model.moe else 1
    ep = 2 if full.ep > 1 and sharing % 2 == experts % 2 == 0 else 1
    replicas = 2 if full.replicas > 1 and left % 2 == 0 and sharing // 2 % ep == 0 else 1
    piped = axes["pp"] > 1
    return {
        **full.model_dump(mode="json"),
        **axes,
        "ep": ep,
        "replicas": replicas,
        "inner_ring": min(full.inner_ring, axes["cp"]),
        "schedule": full.schedule if piped else "1f1b",
        "virtual": min(full.virtual, 2) if piped else 1,
        "contiguous": None,
    }


def _sources(config: PretrainConfig, label: str) -> dict[str, Any]:
    """A part of the text for each source: names that begin with every k-th letter; the last has whatever is left."""
    found: dict[str, Any] = {}
    names: Sequence[str] = list(config.sources)
    for number, (name, source) in enumerate(config.sources.items()):
        letters = string.ascii_lowercase[number :: len(names)]
        match = [] if name == names[-1] else [f"{glob.escape(label)}/[{letters}{letters.upper()}]*"]
        found[name] = {**source.model_dump(mode="json"), "match": match, "kind": None, "shards": []}
    return found


def _label(text: str) -> str:
    """What names of documents of the text begin with."""
    if text == STDLIB:
        return STDLIB
    if not Path(text).is_dir():
        raise UsageError("the text of a shrunk recipe is no folder", value=text, allowed=f"{STDLIB}, or a folder")
    return Path(text).resolve().name or "root"


def _lowered(values: Values, most: Mapping[str, int]) -> dict[str, int]:
    """These fields, at most so large; those that are open are so large."""
    found = {}
    for field, limit in most.items():
        given = values.get(field)
        found[field] = limit if given is None else min(given, limit)
    return found


def _references(value: Any) -> Any:
    """Runs of other recipes, wherever they are named, as their shrunk ones."""
    if isinstance(value, dict):
        return {name: _references(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_references(inner) for inner in value]
    return value + SHRUNK if isinstance(value, str) and RUN.fullmatch(value) else value
