"""How Meta's model-parallel shards cut a model: which stretch of each canonical tensor shard s of n holds."""

from __future__ import annotations

from collections.abc import Mapping

from herd.architecture import LlamaConfig, shard_axis
from herd.errors import UsageError

__all__ = ["check_divisible", "shard_shapes", "shard_slice"]

Shape = tuple[int, ...]


def check_divisible(config: LlamaConfig, shards: int) -> None:
    """UsageError when a model of this shape cannot be cut into `shards` equal parts."""
    if shards < 1:
        raise UsageError("the number of shards must be positive", value=shards)
    widths = {"n_heads": config.n_heads, "vocab_size": config.vocab_size, "ffn_dim": config.ffn_dim, "dim": config.dim}
    if config.moe is not None:
        widths["moe.ffn_dim"] = config.moe.ffn_dim
    for name, width in widths.items():
        if width % shards:
            raise UsageError(
                f"{name} = {width} cannot be cut into equal shards", value=shards, allowed=f"divisors of {width}"
            )
    heads = config.n_kv_heads
    if heads % shards and shards % heads:
        raise UsageError(f"{heads} key/value heads cannot be dealt to the shards", value=shards)


def shard_slice(name: str, shape: Shape, config: LlamaConfig, shard: int, shards: int) -> tuple[slice, ...]:
    """Index of shard `shard`'s part in canonical tensor `name` of `shape`; () when every shard holds all of it.

    With more shards than key/value heads, each head's rows are in several shards.
    """
    axis = shard_axis(name, config)
    if axis is None:
        return ()
    if name.endswith(("attention.wk.weight", "attention.wv.weight")):
        length = max(config.n_kv_heads // shards, 1) * config.head_dim
        start = shard * config.n_kv_heads // shards * config.head_dim
    else:
        length = shape[axis] // shards
        start = shard * length
    return (slice(None),) * axis + (slice(start, start + length),)


def shard_shapes(shapes: Mapping[str, Shape], config: LlamaConfig, shards: int) -> dict[str, Shape]:
    """The canonical shapes of one shard's parts, equal for all shards."""
    result: dict[str, Shape] = {}
    for name, shape in shapes.items():
        cut = shard_slice(name, shape, config, 0, shards)
        if cut:
            axis = len(cut) - 1
            shape = (*shape[:axis], cut[axis].stop - cut[axis].start, *shape[axis + 1 :])
        result[name] = shape
    return result
