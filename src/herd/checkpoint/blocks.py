"""GGUF's block formats Q8_0 and Q4_0, vectorised, bit for bit as the reference quantiser writes them.

A block is 32 neighbouring weights x of one row with one scale d, stored as float16 before the weights:

    Q8_0   d = max|x| / 127      q = round(x / d), half away from zero, one signed byte each
    Q4_0   d = x* / -8 for the x* of largest magnitude (the first of them), q = min(15, trunc(x / d + 8.5)),
           two per byte: weight j in the low half of byte j, weight j + 16 in the high half

Reading gives d·q and d·(q - 8). The division by d is a product with 1/d in float32, as in the reference, and uses d
before it is rounded to float16. Source: the GGML quantisation formats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from herd.checkpoint.numbers import BLOCK, BLOCK_BYTES, PLAIN, Array
from herd.errors import HerdError, UsageError

__all__ = ["dequantize", "quantize"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_BLOCKS_AT_ONCE = 1 << 16  # 8 MiB of float32: the temporaries stay in cache, whatever the tensor's size


def quantize(type_name: str, weights: Array) -> bytes:
    """Encode `weights` [..., N] as `type_name` ("q8_0" or "q4_0", N a multiple of 32; "f32", "f16", "bf16": any N).

    Returns the bytes as they lie in a GGUF file. Raises UsageError for another type or width, HerdError when a weight
    is not finite or a block's scale does not fit in float16.
    """
    if type_name in PLAIN:
        return weights.astype(PLAIN[type_name]).tobytes()
    encode = {"q8_0": _encode_q8_0, "q4_0": _encode_q4_0}.get(type_name)
    if encode is None:
        raise UsageError("unknown block format", value=type_name, allowed=", ".join([*BLOCK_BYTES, *PLAIN]))
    if weights.ndim == 0 or weights.shape[-1] % BLOCK:
        raise UsageError(f"{type_name} needs rows of whole blocks", value=weights.shape, allowed="a last axis of 32·n")
    blocks = weights.reshape(-1, BLOCK)
    out = np.empty((len(blocks), BLOCK_BYTES[type_name]), np.uint8)
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        floats = blocks[part].astype(np.float32)
        if not np.isfinite(floats).all():
            raise HerdError(f"weights that are not finite cannot be stored as {type_name}")
        encode(floats, out[part])
    return out.tobytes()


def dequantize(type_name: str, blocks: bytes | Bytes) -> Floats:
    """Decode the bytes of a tensor of any supported type to a flat float32 array."""
    raw: Bytes = np.frombuffer(blocks, np.uint8) if isinstance(blocks, bytes) else blocks.reshape(-1)
    if type_name in PLAIN:
        return raw.view(PLAIN[type_name]).astype(np.float32)
    if type_name not in BLOCK_BYTES:
        raise UsageError("unknown block format", value=type_name, allowed=", ".join([*BLOCK_BYTES, *PLAIN]))
    size = BLOCK_BYTES[type_name]
    if raw.size % size:
        raise UsageError(f"{type_name} data is made of blocks", value=raw.size, allowed=f"a multiple of {size} bytes")
    decode = _decode_q8_0 if type_name == "q8_0" else _decode_q4_0
    rows = raw.reshape(-1, size)
    out = np.empty((len(rows), BLOCK), np.float32)
    for first in range(0, len(rows), _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        decode(rows[part], out[part])
    return out.reshape(-1)


def _encode_q8_0(x: Floats, out: Bytes) -> None:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    # Half away from zero, on the exact fraction: floor(m + 0.5) would round 0.49999997 up.
    rounded = whole + (magnitude - whole >= np.float32(0.5))
    _store_scale(scale, out)
    out[:, 2:] = np.copysign(rounded, scaled).astype(np.int8).view(np.uint8)


def _encode_q4_0(x: Floats, out: Bytes) -> None:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    q = np.minimum(x * _inverse(scale) + np.float32(8.5), np.float32(15)).astype(np.uint8)
    _store_scale(scale, out)
    half = BLOCK // 2
    out[:, 2:] = q[:, :half] | q[:, half:] << 4


def _decode_q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(_load_scale(blocks), blocks[:, 2:].view(np.int8), out=out)


def _decode_q4_0(blocks: Bytes, out: Floats) -> None:
    half, scale, pairs = BLOCK // 2, _load_scale(blocks), blocks[:, 2:]
    np.multiply(scale, (pairs & 15).astype(np.int8) - np.int8(8), out=out[:, :half])
    np.multiply(scale, (pairs >> 4).astype(np.int8) - np.int8(8), out=out[:, half:])


def _inverse(scale: Floats) -> Floats:
    """1/d, and 0 where d is 0 or so small that 1/d overflows: such a d is stored as 0 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _store_scale(scale: Floats, out: Bytes) -> None:
    with np.errstate(over="ignore"):
        stored = scale.astype("<f2")
    if not np.isfinite(stored).all():
        raise HerdError(
            "weights are too large for a block format",
            value=float(np.abs(scale).max()),
            allowed="a block scale up to 65504",
            fix="use --dtype bf16 or f32",
        )
    out[:, :2] = stored.view(np.uint8)


def _load_scale(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
