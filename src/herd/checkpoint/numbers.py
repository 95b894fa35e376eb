"""The number formats weights are stored in, their names in each file format, and exact conversion between them.

Herd's own names are short and lower-case: "f32", "f16", "bf16" for plain numbers, "q8_0", "q4_0" for GGUF's blocks of
32 weights that share one scale. bfloat16 is numpy's through `ml_dtypes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from herd.errors import HerdError, UsageError

__all__ = ["BLOCK", "BLOCK_BYTES", "PLAIN", "cast", "check_dtype", "name_of", "stored_bytes"]

Array = npt.NDArray[np.generic]

PLAIN: dict[str, np.dtype[np.generic]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""Plain number formats and their numpy types."""

BLOCK = 32
"""Weights in one block of a quantised format."""

BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
"""Bytes of one block: a 16-bit scale and 32 weights of 8 or 4 bits."""

_NAMES = {dtype: name for name, dtype in PLAIN.items()}


def name_of(array: Array) -> str:
    """Herd's name of an array's number format; UsageError when it is not one that weights are stored in."""
    name = _NAMES.get(array.dtype)
    if name is None:
        raise UsageError("weights of this type cannot be stored", value=str(array.dtype), allowed=", ".join(PLAIN))
    return name


def check_dtype(dtype: str | None, fmt: str) -> None:
    """UsageError unless format `fmt` ("hf", "meta", "gguf") can store `dtype`; None means "as the source has it"."""
    allowed = [*PLAIN, *BLOCK_BYTES] if fmt == "gguf" else [*PLAIN]
    if dtype is not None and dtype not in allowed:
        fix = "herd convert SRC DST.gguf --to gguf --dtype " + dtype if dtype in BLOCK_BYTES else None
        raise UsageError(f"format {fmt!r} cannot store this dtype", value=dtype, allowed=", ".join(allowed), fix=fix)


def stored_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` stored as `type_name`. Blocks run along the last axis, a multiple of 32 wide."""
    count = math.prod(shape)
    if type_name in PLAIN:
        return count * PLAIN[type_name].itemsize
    return count // BLOCK * BLOCK_BYTES[type_name]


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
