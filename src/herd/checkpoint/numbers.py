"""The number formats weights are stored in, their names in each file format, and exact conversion between them.

Herd's own names are short and lower-case: "f32", "f16", "bf16" for plain numbers, "q8_0", "q4_k", … for GGUF's blocks
of neighbouring weights that share scales. bfloat16 is numpy's through `ml_dtypes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from herd.errors import HerdError, UsageError

__all__ = ["BLOCKS", "PLAIN", "BlockFormat", "cast", "name_of", "stored_bytes"]

Array = npt.NDArray[np.generic]

PLAIN: dict[str, np.dtype[np.generic]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""Plain number formats and their numpy types."""


class BlockFormat(NamedTuple):
    """A quantised format: neighbouring weights of a row that make up a block, and the block's bytes."""

    weights: int
    bytes: int


BLOCKS = {
    "q4_0": BlockFormat(32, 18),
    "q4_1": BlockFormat(32, 20),
    "q5_0": BlockFormat(32, 22),
    "q5_1": BlockFormat(32, 24),
    "q8_0": BlockFormat(32, 34),
    "iq4_nl": BlockFormat(32, 18),
    "q2_k": BlockFormat(256, 84),
    "q3_k": BlockFormat(256, 110),
    "q4_k": BlockFormat(256, 144),
    "q5_k": BlockFormat(256, 176),
    "q6_k": BlockFormat(256, 210),
    "iq4_xs": BlockFormat(256, 136),
}
"""GGUF's block formats; `herd.checkpoint.blocks` says what the bytes mean."""

_NAMES = {dtype: name for name, dtype in PLAIN.items()}


def name_of(array: Array) -> str:
    """Herd's name of an array's number format; UsageError when it is not one that weights are stored in."""
    name = _NAMES.get(array.dtype)
    if name is None:
        raise UsageError("weights of this type cannot be stored", value=str(array.dtype), allowed=", ".join(PLAIN))
    return name


def stored_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` stored as `type_name`. Blocks run along the last axis, which holds whole ones."""
    count = math.prod(shape)
    if type_name in PLAIN:
        return count * PLAIN[type_name].itemsize
    block = BLOCKS[type_name]
    return count // block.weights * block.bytes


def cast(array: Array, type_name: str, tensor: str) -> Array:
    """`array` as plain number format `type_name`, rounded to nearest even; the same array when it is that already.

    Raises HerdError when a finite weight would become infinite, which only float16 (largest value 65504) can do to
    trained weights. `tensor` names the weight in the message.
    """
    dtype = PLAIN[type_name]
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if type_name == "f16" and not np.isfinite(result).all():
        wide = array.astype(np.float32)
        lost = np.isfinite(wide) & ~np.isfinite(result)
        if lost.any():
            raise HerdError(
                f"{tensor} has weights too large for float16",
                value=float(np.abs(wide[lost]).max()),
                allowed="magnitudes up to 65504",
                fix="use --dtype bf16 or f32",
            )
    return result
