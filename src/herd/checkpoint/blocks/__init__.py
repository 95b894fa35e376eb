"""GGUF's block formats: weights to blocks and back.

    >>> data = quantize("q4_k", weights)                       # bytes, as they lie in a GGUF file
    >>> near = dequantize("q4_k", data).reshape(weights.shape)  # float32

Encoding searches the scales of least squared error, in the compiled part (native/kernels/quantize_fit.h). Without it,
Q8_0 and Q4_0 are written by the plain rules of the reference, and the others cannot be.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from herd.cgroup import usable_cpus
from herd.checkpoint.blocks.decode import DECODERS
from herd.checkpoint.blocks.plain import PLAIN_ENCODERS
from herd.checkpoint.blocks.shared_scales import Rounding, encode_shared
from herd.checkpoint.numbers import BLOCKS, PLAIN, Array
from herd.errors import HerdError, UsageError

try:
    from herd import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

__all__ = ["Rounding", "dequantize", "quantize"]

_WEIGHTS_AT_ONCE = 1 << 19  # 2 MiB of float32: the temporaries stay in cache, whatever the tensor's size


def quantize(
    type_name: str,
    weights: Array,
    importance: npt.NDArray[np.float32] | None = None,
    *,
    rounding: Rounding | None = None,
    threads: int | None = None,
) -> bytes:
    """Encode `weights` [..., N] as `type_name`, N a multiple of its block; a plain format takes any N.

    `importance` [N]: what the squared error of each column weighs, for example the mean square of what the column is
    multiplied by. `rounding`: no search but this plain rule, for q4_0 and q8_0; importance then has no say. `threads`:
    by default one for each processor. Returns the bytes as they lie in a GGUF file. Raises
    UsageError for another type or width, HerdError when a weight is not finite or a block's scale does not fit in
    float16, or when the compiled part is needed and missing.
    """
    if type_name in PLAIN:
        return weights.astype(PLAIN[type_name]).tobytes()
    if type_name not in BLOCKS:
        raise UsageError("unknown block format", value=type_name, allowed=", ".join([*BLOCKS, *PLAIN]))
    block = BLOCKS[type_name]
    if weights.ndim == 0 or weights.shape[-1] % block.weights:
        raise UsageError(
            f"{type_name} needs rows of whole blocks", value=weights.shape, allowed=f"a last axis of {block.weights}·n"
        )
    rows = np.ascontiguousarray(weights.reshape(-1, weights.shape[-1]), np.float32)
    out = np.empty(rows.size // block.weights * block.bytes, np.uint8)
    if not np.isfinite(rows).all():
        raise HerdError(f"weights that are not finite cannot be stored as {type_name}")
    if importance is not None:
        importance = _checked(importance, rows.shape[1])
    if rounding is not None:
        if type_name not in ("q4_0", "q8_0"):
            raise UsageError("scales cannot be shared in this format", value=type_name, allowed="q4_0, q8_0")
        fits = encode_shared(type_name, rows, rounding, out.reshape(-1, block.bytes))
    elif _native is not None:
        fits = _native.quantize(type_name, rows, importance, out, threads or usable_cpus())
    elif type_name in PLAIN_ENCODERS:
        fits = PLAIN_ENCODERS[type_name](rows.reshape(-1, block.weights), out.reshape(-1, block.bytes))
    else:
        raise HerdError(f"writing {type_name} needs Herd's compiled part, which is missing", fix="herd doctor")
    if not fits:
        raise HerdError(
            "weights are too large for a block format",
            value=float(np.abs(rows).max()),
            allowed="a block scale up to 65504",
            fix="use --dtype bf16 or f32",
        )
    return out.tobytes()


def dequantize(type_name: str, blocks: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Decode the bytes of a tensor of any supported type to a flat float32 array, exactly as the reference does."""
    raw = np.frombuffer(blocks, np.uint8) if isinstance(blocks, bytes) else blocks.reshape(-1)
    if type_name in PLAIN:
        return raw.view(PLAIN[type_name]).astype(np.float32)
    if type_name not in BLOCKS:
        raise UsageError("unknown block format", value=type_name, allowed=", ".join([*BLOCKS, *PLAIN]))
    block = BLOCKS[type_name]
    if raw.size % block.bytes:
        raise UsageError(
            f"{type_name} data is made of blocks", value=raw.size, allowed=f"a multiple of {block.bytes} bytes"
        )
    rows = raw.reshape(-1, block.bytes)
    out = np.empty((len(rows), block.weights), np.float32)
    step = _WEIGHTS_AT_ONCE // block.weights
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            out[first : first + step] = DECODERS[type_name](part).reshape(-1, block.weights)
    return out.reshape(-1)


def _checked(importance: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
    values = np.ascontiguousarray(importance, np.float32)
    if values.shape != (columns,) or not np.isfinite(values).all() or (values < 0).any():
        raise UsageError(
            "importance has one finite weight from 0 for each column", value=values.shape, allowed=f"({columns},)"
        )
    # Some floor for columns that the calibration never used, and numbers of a size that float32 squares well.
    mean = float(values.mean())
    return np.maximum(values / mean, np.float32(1e-4)) if mean > 0 else np.ones(columns, np.float32)
