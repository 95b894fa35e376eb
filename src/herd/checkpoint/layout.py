"""Between canonical tensors and stored ones: the array work behind `herd.architecture.tensors`' tables of names.

A `Rule` there says which canonical tensors a stored tensor holds and in which layout. Here they are taken apart when
reading (`read_part`) and put together when writing (`stored_blocks`), in slabs, so that beside the tensor itself only
one slab is in memory. Letters: E experts, X and Y the two axes of an expert's matrix, K head width, N columns.

    half_split          canonical row 2j + b of a head  ↔  stored row b·K/2 + j         (j < K/2, b = 0 or 1)
    transposed          [E, X, Y] ↔ [E, Y, X]   or   [X, Y] ↔ [Y, X]
    transposed_merged   [E, X, Y] ↔ [E·Y, X]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from herd.architecture import Rule
from herd.checkpoint.numbers import Array

__all__ = ["Rows", "read_part", "stored_blocks", "stored_shape"]

Shape = tuple[int, ...]
Rows = Callable[[int, int], Array]
"""rows(first, count): rows of a stored tensor along its first axis."""

_SLAB_BYTES = 64 << 20


def stored_shape(rule: Rule, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of the stored tensor of `rule`, from the canonical shapes of its parts."""
    parts = [_part_shape(rule, shapes[name]) for name in rule.parts]
    joined = list(parts[0])
    joined[rule.axis] = sum(part[rule.axis] for part in parts)
    return tuple(joined)


def _part_shape(rule: Rule, shape: Shape) -> Shape:
    if rule.layout == "transposed":
        return (*shape[:-2], shape[-1], shape[-2])
    if rule.layout == "transposed_merged":
        return (shape[0] * shape[2], shape[1])
    return shape


def read_part(rule: Rule, index: int, shapes: Mapping[str, Shape], head_dim: int, rows: Rows) -> Array:
    """Canonical tensor `rule.parts[index]`, read through `rows` of the stored tensor and laid out canonically."""
    shape = shapes[rule.parts[index]]
    before = sum(_part_shape(rule, shapes[name])[rule.axis] for name in rule.parts[:index])
    length = _part_shape(rule, shape)[rule.axis]
    if rule.layout == "same":
        assert rule.axis == 0
        return rows(before, length)
    if rule.layout == "half_split":
        return _gather(shape, head_dim, lambda first, count: _interleave(rows(first, count), head_dim), before)
    # An expert's matrix is a slab; a two-dimensional tensor is one matrix.
    matrices, height = (shape[0], shape[2]) if len(shape) == 3 else (1, shape[1])
    out: Array | None = None
    for e in range(matrices):
        if rule.layout == "transposed_merged":
            slab = rows(before + e * height, height)
        else:
            slab = rows(e, 1)[0] if len(shape) == 3 else rows(0, stored_shape(rule, shapes)[0])
            if len(rule.parts) > 1:
                assert rule.axis == len(shape) - 1  # joined side by side
                slab = slab[:, before : before + length]
        if out is None:
            out = np.empty(shape, slab.dtype)
        out.reshape(-1, *shape[-2:])[e] = slab.T
    assert out is not None
    return out


def stored_blocks(rule: Rule, parts: Sequence[Array], head_dim: int) -> Iterator[Array]:
    """The stored tensor of `rule` as consecutive blocks of its rows, from the canonical arrays of its parts."""
    if rule.layout in ("same", "half_split"):
        assert rule.axis == 0
        for part in parts:
            step = _slab_rows(part.shape, part.itemsize, head_dim if rule.layout == "half_split" else 1)
            for first in range(0, len(part), step):
                slab = part[first : first + step]
                yield slab if rule.layout == "same" else _split(slab, head_dim)
        return
    if parts[0].ndim == 2:
        yield np.concatenate([part.T for part in parts], axis=rule.axis)
    elif rule.layout == "transposed_merged":
        yield from (matrix.T for part in parts for matrix in part)
    else:
        for matrices in zip(*parts, strict=True):
            yield np.concatenate([matrix.T for matrix in matrices], axis=rule.axis - 1)[None]


def _gather(shape: Shape, unit: int, slab: Rows, before: int) -> Array:
    step = _slab_rows(shape, 4, unit)
    first_slab = slab(before, min(step, shape[0]))
    if step >= shape[0]:
        return first_slab
    out = np.empty(shape, first_slab.dtype)
    out[:step] = first_slab
    for first in range(step, shape[0], step):
        count = min(step, shape[0] - first)
        out[first : first + count] = slab(before + first, count)
    return out


def _slab_rows(shape: Shape, itemsize: int, unit: int) -> int:
    """Rows in a slab: whole units (heads), about 64 MiB."""
    row = math.prod(shape[1:]) * itemsize
    return max(_SLAB_BYTES // max(row * unit, 1), 1) * unit


def _interleave(half_split: Array, head_dim: int) -> Array:
    """Rows of whole heads from the half-split to the interleaved order."""
    rows, *rest = half_split.shape
    return half_split.reshape(rows // head_dim, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _split(interleaved: Array, head_dim: int) -> Array:
    """Rows of whole heads from the interleaved to the half-split order."""
    rows, *rest = interleaved.shape
    return interleaved.reshape(rows // head_dim, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)
