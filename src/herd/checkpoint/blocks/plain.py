"""Q8_0 and Q4_0 by the plain rules of the reference quantiser, bit for bit: for installations without a compiler.

A block is 32 neighbouring weights x of one row with one scale d, stored as float16 before the weights:

    Q8_0   d = max|x| / 127      q = round(x / d), half away from zero, one signed byte each
    Q4_0   d = x* / -8 for the x* of largest magnitude (the first of them), q = min(15, trunc(x / d + 8.5))

The division by d is a product with 1/d in float32, as in the reference, and uses d before it is rounded to float16.
Source: the GGML quantisation formats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _encode_q8_0(x: Floats, out: Bytes) -> bool:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    # Half away from zero, on the exact fraction: floor(m + 0.5) would round 0.49999997 up.
    rounded = whole + (magnitude - whole >= np.float32(0.5))
    out[:, 2:] = np.copysign(rounded, scaled).astype(np.int8).view(np.uint8)
    return _store_scale(scale, out)


def _encode_q4_0(x: Floats, out: Bytes) -> bool:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    q = np.minimum(x * _inverse(scale) + np.float32(8.5), np.float32(15)).astype(np.uint8)
    out[:, 2:] = q[:, :16] | q[:, 16:] << 4
    return _store_scale(scale, out)


def _inverse(scale: Floats) -> Floats:
    """1/d, and 0 where d is 0 or so small that 1/d overflows: such a d is stored as 0 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _store_scale(scale: Floats, out: Bytes) -> bool:
    with np.errstate(over="ignore"):
        stored = scale.astype("<f2")
    out[:, :2] = stored.view(np.uint8)
    return bool(np.isfinite(stored).all())


PLAIN_ENCODERS: dict[str, Callable[[Floats, Bytes], bool]] = {"q8_0": _encode_q8_0, "q4_0": _encode_q4_0}
"""Format → function from [n, 32] weights into [n, bytes] blocks; False when a scale does not fit in float16."""
