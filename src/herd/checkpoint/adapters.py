"""Low-rank adapters (LoRA, arXiv 2106.09685) as the PEFT library stores them: a directory with adapter_config.json and
adapter_model.safetensors. Only plain LoRA of the projections is read; anything more is an error, never left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from herd.architecture import LlamaConfig, Rule, stored_tensors, tensor_shapes
from herd.checkpoint.layout import read_part
from herd.checkpoint.safetensors import SafetensorsFile
from herd.errors import FileFormatError
from herd.files import read_json_object

__all__ = ["Adapter", "LowRank", "read_adapter"]

MAX_RANK = 1024
MAX_ALPHA = 1_000_000  # far beyond any use, and far from the end of float32
_PREFIX = "base_model.model."
_VARIANTS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "modules_to_save",
    "lora_bias",
)


@dataclass(frozen=True)
class LowRank:
    """The change b·a to one matrix [rows, columns]: a [rank, columns], and b [rows, rank] with the factor in it."""

    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]


Adapter = Mapping[str, LowRank]
"""Canonical name of a matrix → its change."""


def read_adapter(path: str | Path, config: LlamaConfig) -> dict[str, LowRank]:
    """Read an adapter for a model of this shape. FileFormatError names the file and field of what does not fit."""
    directory = Path(path)
    place = directory / "adapter_config.json"
    settings = read_json_object(place)
    _check(settings, place)
    file = SafetensorsFile(directory / "adapter_model.safetensors")
    try:
        changes: dict[str, LowRank] = {}
        unused = set(file.tensors)
        shapes = tensor_shapes(config)
        for rule in stored_tensors("hf", config):
            stem = _PREFIX + rule.stored.removesuffix(".weight")
            names = (stem + ".lora_A.weight", stem + ".lora_B.weight")
            if not unused & set(names):
                continue
            (name,) = rule.parts
            changes[name] = _read(file, rule, names, shapes[name], config.head_dim, settings, place)
            unused -= set(names)
        if unused:
            raise FileFormatError("this is not a change to a projection", file=file.path, field=min(unused))
        return changes
    finally:
        file.close()


def _check(settings: Mapping[str, Any], place: Path) -> None:
    """What changes the arithmetic must be absent or switched off."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise FileFormatError("only LoRA adapters are read", file=place, field="peft_type", value=kind)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise FileFormatError("impossible rank", file=place, field="r", value=rank, allowed=f"1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or not -MAX_ALPHA <= alpha <= MAX_ALPHA:
        allowed = f"a number up to {MAX_ALPHA:,}"
        raise FileFormatError("impossible factor", file=place, field="lora_alpha", value=alpha, allowed=allowed)
    for field in _VARIANTS:
        if settings.get(field):
            raise FileFormatError("this is not plain LoRA", file=place, field=field, value=settings[field])
    if settings.get("bias", "none") != "none":
        raise FileFormatError("Llama has no biases", file=place, field="bias", value=settings["bias"])


def _read(
    file: SafetensorsFile,
    rule: Rule,
    names: tuple[str, str],
    shape: tuple[int, ...],
    head_dim: int,
    settings: Mapping[str, Any],
    place: Path,
) -> LowRank:
    rank = settings["r"]
    for name, expected in zip(names, ((rank, shape[-1]), (shape[0], rank)), strict=True):
        tensor = file.tensors.get(name)
        if tensor is None:
            raise FileFormatError("a part of the adapter is missing", file=file.path, field=name)
        if len(shape) != 2 or tensor.shape != expected:
            raise FileFormatError(
                "the shape contradicts the model", file=file.path, field=name, value=tensor.shape, allowed=str(expected)
            )
    factor = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    a = file.rows(names[0], 0, rank).astype(np.float32)
    # B has the rows of the matrix, in the layout of the file.
    shapes = {rule.parts[0]: (shape[0], rank)}
    b = read_part(rule, 0, shapes, head_dim, lambda first, count: file.rows(names[1], first, count))
    return LowRank(a, np.ascontiguousarray(b.astype(np.float32) * np.float32(factor)))
