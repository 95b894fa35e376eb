"""Will it fit? The memory a model needs, computed from its shape before the first tensor is read.

All sizes in bytes. The plan is the backend's promise: weights, one sequence of full context, and working space.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from herd.architecture import LlamaConfig
from herd.architecture.size import kv_cache_bytes, parameter_count
from herd.cgroup import memory_available
from herd.errors import OutOfMemory
from herd.progress import status

GIB = 1 << 30
MIB = 1 << 20
_BYTES = {"f32": 4, "bf16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """What loading a model takes, and what is free for it (None where the system does not tell)."""

    weights: int
    cache_per_token: int
    context: int
    work: int
    free: int | None
    converting: int = 0
    """What weights take on their way into memory, before there is any work."""

    def __str__(self) -> str:
        return (
            f"{in_words(self.needed)} of memory (weights {in_words(self.weights)}, "
            f"cache for {self.context} tokens {in_words(self.cache)}, work {in_words(self.work)})"
        )

    @property
    def cache(self) -> int:
        """Keys and values of one sequence of full context."""
        return self.cache_per_token * self.context

    @property
    def needed(self) -> int:
        return self.weights + max(self.cache + self.work, self.converting)

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free

    @property
    def spare(self) -> int | None:
        """What remains for further sequences beside the first."""
        return None if self.free is None else self.free - self.needed


def plan_memory(
    config: LlamaConfig, *, weights: str, kv: str, context: int, prefill_tokens: int, rows: int
) -> MemoryPlan:
    """Plan for weights and cache stored as "f32" or "bf16". `rows` sequences decode together."""
    width = _BYTES[weights]
    experts = config.moe.ffn_dim if config.moe else 0
    # Widest moment of a block: gate, up and their product, beside a few copies of the residual stream.
    block = prefill_tokens * (3 * max(config.ffn_dim, experts) + 6 * config.dim) * width
    logits = 3 * rows * config.vocab_size * 4
    return MemoryPlan(
        weights=parameter_count(config) * width,
        cache_per_token=kv_cache_bytes(config, 1, _BYTES[kv]),
        context=context,
        work=block + logits,
        free=available_bytes(),
    )


def in_words(size: int) -> str:
    """Bytes as people read them: `7.5 GiB`, `18.3 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def free_for(free: int | None, *, promised: int, limit: int | None) -> int | None:
    """Of what is free, what a model may take: not what another one was promised, and no more than its own limit."""
    known = [size for size in (None if free is None else max(0, free - promised), limit) if size is not None]
    return min(known) if known else None


def require_memory(plan: MemoryPlan, *, name: str, alternatives: Iterable[tuple[str, MemoryPlan]]) -> None:
    """Show the plan on a terminal; raise OutOfMemory when it does not fit, with the first alternative that does.

    `alternatives`: (how to load the model, what that takes), best first.
    """
    if plan.fits:
        status(f"loading {name}: {plan}")
        return
    fix = next((_advice(how) for how, other in alternatives if other.fits), "use a smaller model")
    assert plan.free is not None
    raise OutOfMemory(f"{name} needs {plan}", plan.needed, value=f"{in_words(plan.free)} free", fix=fix)


def _advice(how: str) -> str:
    """The same arguments as Python and as the command line take them."""
    options = " ".join(f"--{name} {value}" for name, value in re.findall(r'(\w+)="?(\w+)', how))
    return f"load it with {how} (on the command line: {options})"


def smaller_contexts(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """The same with the longest context that fits, if that is worth having."""
    if plan.free is not None:
        room = (plan.free - plan.weights - plan.work) // plan.cache_per_token // 256 * 256
        if 256 <= room < plan.context:
            yield f"ctx={room}", replace(plan, context=room)


def available_bytes() -> int | None:
    """Memory this process may still take: the system's and what its control groups leave, whichever is less."""
    known = [size for size in (_system_available(), memory_available()) if size is not None]
    return min(known) if known else None


def _system_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
