"""From a checkpoint's tensors to the native engine: which format each is held in, and loading them one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from herd import _native
from herd.architecture import LlamaConfig, stored_tensors
from herd.checkpoint import Checkpoint
from herd.checkpoint.blocks import dequantize, quantize
from herd.checkpoint.mixes import MIXES, Activations, gguf_type, rounding_of
from herd.checkpoint.numbers import BLOCKS, PLAIN, cast, stored_bytes
from herd.engine.memory import MemoryPlan, available_bytes, free_for, smaller_contexts
from herd.errors import HerdError, UsageError, near
from herd.progress import track

WEIGHTS = (*MIXES, *PLAIN)
"""What `quant` may be; None keeps the formats of the checkpoint."""

MAX_HEAD_DIM = 1024

_SMALLER = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")  # best first
_MAX_INT = (1 << 31) - 1
_SLAB_BYTES = 32 << 20  # of weights in 32 bits on their way to another format
_LOGITS = 3  # arrays of logits that exist together: the model's, and the sampler's while it sorts and weighs


def weight_formats(checkpoint: Checkpoint, quant: str | None) -> dict[str, str]:
    """Canonical name → format in memory, for every matrix. Raises UsageError for an unknown `quant`."""
    if quant is not None and quant not in WEIGHTS:
        raise UsageError("weights cannot be held like this", value=quant, allowed=near(quant, WEIGHTS))
    formats = {}
    for rule in stored_tensors("gguf", checkpoint.config):
        (name,) = rule.parts
        shape = checkpoint.shape(name)
        if len(shape) > 1:
            stored = checkpoint.type_name(name)
            formats[name] = stored if quant is None else gguf_type(rule.stored, shape, quant, checkpoint.config)
    return formats


@dataclass(frozen=True)
class Need:
    """What running takes beside weights: a cache of number type `kv`, steps of up to `rows` rows with logits of
    `outputs`; what another model of this process was `promised`, and the `limit` of this one."""

    kv: str
    rows: int
    outputs: int
    promised: int = 0
    limit: int | None = None


def plan_native(checkpoint: Checkpoint, formats: dict[str, str], need: Need, context: int) -> MemoryPlan:
    """What matrices in `formats` take, and running them."""
    config, moe = checkpoint.config, checkpoint.config.moe
    weights = converting = 0
    for name, held in formats.items():
        shape = checkpoint.shape(name)
        *experts, height, width = shape
        weights += math.prod(experts) * _native.packed_bytes(held, height, width)
        kind = checkpoint.type_name(name)
        if kind != held:  # the stored tensor, one of its matrices as it will be, and a slab
            slab = 4 * min(_SLAB_BYTES, 4 * height * width)
            converting = max(converting, stored_bytes(kind, shape) + stored_bytes(held, (height, width)) + slab)
        elif checkpoint.extent(name) is None:
            converting = max(converting, stored_bytes(kind, shape))
    head_width = -(-config.head_dim // 16) * 16
    number = {"f32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / head_width}[need.kv]
    # Of a row: inputs of products as up to 8 bytes a number, and states, queries, keys and values in 32 bits.
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    per_row = 8 * (2 * config.dim + heads + config.ffn_dim) + 4 * (3 * config.dim + heads)
    if moe:  # routed rows
        per_row += moe.top_k * (8 * (config.dim + moe.ffn_dim) + 4 * config.dim)
    rotation = 8 * context * config.head_dim  # cosines and sines, and as much again while they are computed
    running = need.rows * per_row + _LOGITS * need.outputs * config.vocab_size * 4 + rotation
    return MemoryPlan(
        weights=weights,
        cache_per_token=math.ceil(2 * config.n_layers * config.n_kv_heads * head_width * number),
        context=context,
        work=running,
        converting=converting,
        free=free_for(available_bytes(), promised=need.promised, limit=need.limit),
    )


def smaller_plans(
    checkpoint: Checkpoint, plan: MemoryPlan, need: Need, quant: str | None
) -> Iterator[tuple[str, MemoryPlan]]:
    """What to try when `plan` does not fit: half of the context, fewer bits, and then less and less of both."""
    for how, shorter in smaller_contexts(plan):
        if shorter.context >= plan.context // 2:
            yield how, shorter
    for mix in _SMALLER:
        formats = weight_formats(checkpoint, mix)
        other = plan_native(checkpoint, formats, need, plan.context)
        if mix != quant and other.weights < plan.weights:
            yield f'quant="{mix}"', other
            for how, shorter in smaller_contexts(other):
                yield f'quant="{mix}" and {how}', shorter


def make_engine(
    config: LlamaConfig,
    formats: dict[str, str],
    checkpoint: Checkpoint,
    *,
    activations: Activations,
    threads: int,
    cpus: Sequence[int] = (),
) -> _native.Engine:
    """An engine with room for the weights, which are still to be loaded."""
    matrices = []
    for name, format_name in formats.items():
        shape = checkpoint.shape(name)
        names = [name] if len(shape) == 2 else [f"{name}.{e}" for e in range(shape[0])]
        matrices += [(each, format_name, shape[-2], shape[-1]) for each in names]
    if config.head_dim > MAX_HEAD_DIM:
        raise HerdError("heads are wider than the native engine can", value=config.head_dim, allowed=f"{MAX_HEAD_DIM}")
    moe, temperature = config.moe, config.attention_temperature
    layers = range(config.n_layers)
    return _native.Engine(
        dim=config.dim,
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        norm_eps=config.norm_eps,
        qk_norm=config.qk_norm,
        temperature=temperature.attn_scale if temperature else 0.0,
        temperature_floor=min(temperature.floor_scale, _MAX_INT) if temperature else 1,
        experts=moe.n_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
        token_scales=activations == "token",
        rotates=[config.uses_rope(i) for i in layers],
        chunks=[min(config.attention_chunk or 0, _MAX_INT) if config.uses_rope(i) else 0 for i in layers],
        matrices=matrices,
        threads=threads,
        cpus=list(cpus),
    )


def load_weights(
    engine: _native.Engine, checkpoint: Checkpoint, formats: dict[str, str], quant: str | None = None
) -> None:
    """Read, convert to the formats that `weight_formats` gave for `quant`, and pack every tensor.

    What is kept as it is stored goes from the file to its packed form piece by piece; of the rest, one tensor at a time
    is in memory beside the packed ones. Raises HerdError when a file ends too early.
    """
    for name in track(list(checkpoint), label="loading"):
        if name not in formats:
            engine.load_norm(name, np.ascontiguousarray(checkpoint[name], np.float32))
            continue
        shape, extent = checkpoint.shape(name), checkpoint.extent(name)
        names = [name] if len(shape) == 2 else [f"{name}.{e}" for e in range(shape[0])]
        if extent is None or checkpoint.type_name(name) != formats[name]:
            for each, data in zip(names, _converted(checkpoint, name, formats[name], quant), strict=True):
                engine.load(each, data)
            continue
        size = extent.nbytes // len(names)
        for e, each in enumerate(names):
            try:
                engine.load_file(each, extent.descriptor, extent.offset + e * size, size)
            except RuntimeError as error:
                raise HerdError(f"{checkpoint.path} cannot be loaded: {error}") from None
    engine.ready()


def _converted(
    checkpoint: Checkpoint, name: str, format_name: str, quant: str | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor's matrix, or of each expert's, in the format wanted."""
    raw = checkpoint.raw(name)
    height, width = raw.shape[-2:]
    n_matrices = math.prod(raw.shape[:-2])
    rounding = rounding_of(format_name, quant)
    step = max(1, _SLAB_BYTES // (4 * width))
    for data in raw.data.reshape(n_matrices, -1):
        if raw.type_name == format_name:
            yield data
            continue
        stored_rows = data.reshape(height, -1)
        out = np.empty((height, stored_bytes(format_name, (width,))), np.uint8)
        for first in range(0, height, step):
            slab = stored_rows[first : first + step]
            values = slab.view(PLAIN[raw.type_name]) if raw.type_name in PLAIN else dequantize(raw.type_name, slab)
            rows = values.reshape(-1, width)
            if format_name in BLOCKS:
                encoded = np.frombuffer(quantize(format_name, rows, rounding=rounding), np.uint8)
            else:
                encoded = np.ascontiguousarray(cast(rows, format_name, name)).view(np.uint8)
            out[first : first + step] = encoded.reshape(len(rows), -1)
        yield out.reshape(-1)
