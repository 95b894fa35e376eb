"""GGUF's block formats decoded, vectorised: what the bytes of a block say, and nothing more.

Simple formats have blocks of 32 weights of one row with a float16 scale d (and a float16 offset m):

    q4_0   d·(q - 8)          q4_1   d·q + m          q8_0     d·q
    q5_0   d·(q - 16)         q5_1   d·q + m          iq4_nl   d·codebook[q]

Super-blocks have 256 weights in groups of 16 or 32; a group's scale s (and offset m) are small whole numbers, times one
float16 d (and dmin) for all groups:

    q2_k   (d·s)·q - dmin·m     q4_k, q5_k   (d·s)·q - dmin·m      iq4_xs   (d·(s - 32))·codebook[q]
    q3_k   (d·(s - 32))·q       q6_k         (d·s)·q

Products are taken in float32 in the order written here, which makes the values those of the reference, bit for bit.
Half-byte formats keep the first half of a group in the low halves of its bytes and the second in the high halves.
Source: the GGML quantisation formats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""Values of the 4-bit codes of iq4_nl and iq4_xs, closer together near 0, where most weights are."""

_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_five_bits(blocks[:, 2:]) - np.float32(16))


def _q5_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _five_bits(blocks[:, 4:]) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * CODEBOOK[_nibbles(blocks[:, 2:])]


def _q2_k(blocks: Bytes) -> Floats:
    both, qs = blocks[:, :16, None], blocks[:, 16:80]
    q = _two_bits(qs).reshape(-1, 16, 16)
    scale = _half(blocks, 80)[..., None] * (both & 15).astype(np.float32)
    offset = _half(blocks, 82)[..., None] * (both >> 4).astype(np.float32)
    return scale * q - offset


def _q3_k(blocks: Bytes) -> Floats:
    high, qs, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    low4 = (packed[:, None, :8] >> _NIBBLES & 15).reshape(-1, 16)
    high2 = (packed[:, None, 8:] >> _PAIRS & 3).reshape(-1, 16)
    scale = (low4 | high2 << 4).astype(np.float32)[..., None] - np.float32(32)
    q = _two_bits(qs) | (high[:, None] >> _BITS & 1) << 2  # the third bit stands for +4
    values: Floats = _half(blocks, 108)[..., None] * scale * (q.reshape(-1, 16, 16).astype(np.float32) - np.float32(4))
    return values


def _q4_k(blocks: Bytes) -> Floats:
    q: Bytes = (blocks[:, 16:].reshape(-1, 4, 1, 32) >> _NIBBLES & np.uint8(15)).reshape(-1, 8, 32)
    return _line(blocks, q)


def _q5_k(blocks: Bytes) -> Floats:
    q: Bytes = (blocks[:, 48:].reshape(-1, 4, 1, 32) >> _NIBBLES & np.uint8(15)).reshape(-1, 8, 32)
    q |= (blocks[:, None, 16:48] >> _BITS & 1) << 4
    return _line(blocks, q)


def _q6_k(blocks: Bytes) -> Floats:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> _NIBBLES & 15).reshape(-1, 8, 32)
    high = _two_bits(blocks[:, 128:192])
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scale = blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = (_half(blocks, 208) * scale)[..., None] * q
    return values


def _iq4_xs(blocks: Bytes) -> Floats:
    low4 = (blocks[:, 4:8, None] >> _NIBBLES[:, 0] & 15).reshape(-1, 8)
    high2 = (blocks[:, 2:4, None] >> _PAIRS[:, 0] & 3).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low4 | high2 << 4).astype(np.float32) - np.float32(32))
    q = (blocks[:, 8:].reshape(-1, 8, 1, 16) >> _NIBBLES & 15).reshape(-1, 8, 32)
    values: Floats = scale[..., None] * CODEBOOK[q]
    return values


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _five_bits(packed: Bytes) -> Bytes:
    """Four bytes with the fifth bit of 32 weights, then their low four bits."""
    fifth: Bytes = np.unpackbits(packed[:, :4], axis=1, bitorder="little") << np.uint8(4)
    return _nibbles(packed[:, 4:]) | fifth


def _two_bits(packed: Bytes) -> Bytes:
    """[n, 64] bytes to [n, 8, 32]: each half holds four rows of 32 weights, one above the other."""
    rows: Bytes = packed.reshape(-1, 2, 1, 32) >> _PAIRS & np.uint8(3)
    return rows.reshape(-1, 8, 32)


def _line(blocks: Bytes, q: Bytes) -> Floats:
    """(d·s)·q - dmin·m of q4_k and q5_k; s and m have 6 bits, of which groups 4 to 7 keep the upper two elsewhere."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    offset = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    values: Floats = (_half(blocks, 0) * scale)[..., None] * q - (_half(blocks, 2) * offset)[..., None]
    return values


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "iq4_nl": _iq4_nl,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip
"""Format → function from blocks [n, bytes] to weights, n blocks in any shape."""
