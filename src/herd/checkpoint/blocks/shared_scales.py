"""Weights as phones and accelerators take them: plain rounding with one scale for many weights, stored in GGUF blocks.

Llama 3.2's quantised models have 4-bit weights in groups of 32 and an 8-bit embedding and head with one scale a row;
Llama 4's experts have 4-bit weights in groups of 128. GGUF has no formats of their own for that, and needs none: a
block of Q4_0 or Q8_0 is 32 codes with a scale, and neighbouring blocks may repeat it.

    d = max|w| over the group / levels, rounded to float16      q = round(w / d), ties to even, kept in range
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Rounding", "encode_shared"]

_BLOCK = 32
_ROOM = 1 << 19  # weights at once: the temporaries stay in cache


class Rounding(NamedTuple):
    """`group`: neighbouring weights of a row that share a scale, a multiple of 32 (0: all of them; the last group of a
    row may be shorter). `levels`: what the largest magnitude is divided by."""

    group: int
    levels: float


def encode_shared(
    type_name: str, rows: npt.NDArray[np.float32], rounding: Rounding, out: npt.NDArray[np.uint8]
) -> bool:
    """Rows [R, N] into the blocks of "q4_0" or "q8_0", `out` [R·N/32, bytes]; False when a scale is beyond float16."""
    width = rows.shape[1]
    starts = np.arange(0, width, rounding.group or width)
    blocks_of_group = np.diff(np.append(starts, width)) // _BLOCK
    step = max(1, _ROOM // width)
    fits = True
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        with np.errstate(over="ignore"):
            scales = (np.maximum.reduceat(np.abs(part), starts, axis=1) / np.float32(rounding.levels)).astype("<f2")
        fits &= bool(np.isfinite(scales).all())
        stored = np.repeat(scales, blocks_of_group, axis=1).reshape(-1, 1)
        unit = stored.astype(np.float32)
        blocks = part.reshape(-1, _BLOCK)
        codes = np.rint(np.divide(blocks, unit, out=np.zeros_like(blocks), where=unit > 0))
        to = out[first * width // _BLOCK :][: len(blocks)]
        to[:, :2] = stored.view(np.uint8)
        if type_name == "q8_0":
            to[:, 2:] = np.clip(codes, -128, 127).astype(np.int8).view(np.uint8)
        else:
            nibbles = (np.clip(codes, -8, 7) + 8).astype(np.uint8)
            to[:, 2:] = nibbles[:, :16] | nibbles[:, 16:] << 4
    return fits
