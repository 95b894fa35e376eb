"""How fast the native engine is, and how fast the machine would let it be.

Speeds are endless generators of tokens per second, one repetition for each `next`, so that a caller can alternate
between programs; the first `next` warms up. Tokens are random, logits are computed and not looked at, as in llama.cpp's
`llama-bench`. What a step must read and multiply follows from the model's shape and formats; what the machine can read
and multiply in a second is measured by the same kernels without any other work.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Generator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from herd.architecture import LlamaConfig
from herd.engine.backend import Backend, Span
from herd.errors import HerdError, ResourceError

Arithmetic = Literal["int8", "f32", "bf16"]
Speeds = Generator[float, None, None]
"""Tokens per second, a repetition for each `next`."""
PEER_CACHE = {"bf16": "f16", "f32": "f32", "int8": "q8_0"}
"""Our number types of the cache, and llama.cpp's of the same size."""

_WARM_UP_TOKENS = 512
_PROBE_BYTES = 1 << 30  # far more than caches hold
_PROBE_ROUNDS = 5
_LAST_LINES = 5


@dataclass(frozen=True)
class Spread:
    """Several repetitions of one measurement."""

    median: float
    low: float
    high: float
    repetitions: int


def spread(values: Sequence[float]) -> Spread:
    """Median and range of what was measured."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Limits:
    """What this machine can do with so many threads: bytes read from memory, and operations, per second."""

    bandwidth: float
    int8: float
    f32: float
    bf16: float

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements: what slowed the other down was not this machine's limit."""
        return Limits(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))

    def share_of_bandwidth(self, n_bytes: float, seconds: float) -> float:
        """Of the bytes that could have been read. Above 1 for a small model, whose weights stay in the caches."""
        return n_bytes / seconds / self.bandwidth

    def share_of_peak(self, operations: dict[Arithmetic, float], seconds: float) -> float:
        """Of the time, what the products would take if nothing but their arithmetic took any."""
        needed = operations["int8"] / self.int8 + operations["f32"] / self.f32 + operations["bf16"] / self.bf16
        return needed / seconds


def limits(threads: int) -> Limits:
    """Measure the machine; takes about a second and a gibibyte of memory, less where less is free."""
    from herd import _native
    from herd.engine.memory import available_bytes

    free = available_bytes()
    size = _PROBE_BYTES if free is None else max(64 << 20, min(_PROBE_BYTES, free // 4))
    bandwidth = _native.read_bandwidth(size, threads, _PROBE_ROUNDS)
    return Limits(bandwidth, *_native.product_peak(threads))


@dataclass(frozen=True)
class Product:
    """A matrix that states are multiplied by. `share`: of the tokens that meet it (of a mixture's experts, few).

    `head`: only tokens whose logits are wanted meet it.
    """

    bytes: int
    weights: int
    arithmetic: Arithmetic
    share: float
    head: bool


@dataclass(frozen=True)
class Work:
    """What steps of a model have to read and to multiply. Attention's own arithmetic is not counted."""

    config: LlamaConfig
    products: tuple[Product, ...]
    weight_bytes: int
    """Of all matrices in memory, those included that are only looked up."""
    cache_bytes: float
    """Of keys and values of one token in one layer."""

    def bytes_read(self, batch: int, depth: float) -> float:
        """By a step of one token for each of `batch` sequences that hold `depth` tokens.

        Experts are counted as often as evenly spread choices would need them.
        """
        weights = sum(p.bytes * (1 - (1 - p.share) ** batch) for p in self.products)
        return weights + batch * self.cache_bytes * sum(self._seen(i, depth) for i in range(self.config.n_layers))

    def operations(self, rows: int, outputs: int) -> dict[Arithmetic, float]:
        """Multiplications and additions of a step of `rows` tokens, `outputs` of which get logits."""
        counts: dict[Arithmetic, float] = {"int8": 0.0, "f32": 0.0, "bf16": 0.0}
        for p in self.products:
            counts[p.arithmetic] += 2 * p.weights * p.share * (outputs if p.head else rows)
        return counts

    def _seen(self, layer: int, depth: float) -> float:
        chunk = self.config.attention_chunk if self.config.uses_rope(layer) else None
        return depth % chunk if chunk else depth


def work_of(path: Path, quant: str | None, kv: str) -> Work:
    """The work of a model as `open_backend` would load it."""
    from herd import _native
    from herd.checkpoint import open_checkpoint
    from herd.checkpoint.numbers import PLAIN
    from herd.engine.native_weights import Need, plan_native, weight_formats

    with open_checkpoint(path) as checkpoint:
        config, formats = checkpoint.config, weight_formats(checkpoint, quant)
        plan = plan_native(checkpoint, formats, Need(kv, rows=1, outputs=1), context=1)
        head = "embed.weight" if config.tied_embeddings else "output.weight"
        products = []
        for name, held in formats.items():
            *experts, height, width = checkpoint.shape(name)
            if name == "embed.weight" != head:  # looked up, not multiplied by
                continue
            copies = math.prod(experts)
            share = config.moe.top_k / config.moe.n_experts if experts and config.moe else 1.0
            size = copies * _native.packed_bytes(held, height, width)
            kind: Arithmetic = "bf16" if held == "bf16" else "f32" if held in PLAIN else "int8"
            products.append(Product(size, copies * height * width, kind, share, name == head))
    return Work(config, tuple(products), plan.weights, plan.cache_per_token / config.n_layers)


def shares(
    work: Work, machine: Limits, speed: float, *, prompt: int, batch: int, depth: int, steps: int
) -> tuple[float | None, float]:
    """Of bandwidth and of peak, at `speed` tokens per second: for a prompt, or for steps of a batch.

    Bandwidth is not what bounds a prompt, whose tokens share the weights that are read: None.
    """
    if prompt:
        return None, machine.share_of_peak(work.operations(prompt, 1), prompt / speed)
    seconds = batch / speed
    read = work.bytes_read(batch, depth + (steps + 1) / 2)
    return machine.share_of_bandwidth(read, seconds), machine.share_of_peak(work.operations(batch, batch), seconds)


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        # Not from getrusage: that begins with what the parent process had.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_prefill(backend: Backend, tokens: int) -> Speeds:
    """Prompts of so many tokens, one at a time, each with the logits after its last token.

    Raises ResourceError when there is no room for one.
    """
    rng = np.random.default_rng(0)
    _timed_prefill(backend, _random(rng, backend, min(tokens, _WARM_UP_TOKENS)))
    backend.settle()
    while True:
        yield tokens / _timed_prefill(backend, _random(rng, backend, tokens))


def measure_decode(backend: Backend, batch: int, depth: int, steps: int) -> Speeds:
    """`steps` steps of one token for each of `batch` sequences that begin with `depth` tokens of their own.

    Raises ResourceError when there is no room for them; close the generator to give their room back.
    """
    rng = np.random.default_rng(0)
    roots: list[int] = []
    try:
        for _ in range(batch):
            roots.append(_open(backend, depth))
            if depth:
                backend.step([Span(roots[-1], _random(rng, backend, depth))])
        _timed_decode(backend, roots, [_random(rng, backend, batch) for _ in range(min(steps, 4))])
        backend.settle()
        while True:
            yield batch * steps / _timed_decode(backend, roots, [_random(rng, backend, batch) for _ in range(steps)])
    finally:
        for root in roots:
            backend.release(root)


def measure_llama_bench(
    program: str,
    model: Path,
    threads: int,
    *,
    prompt: int = 0,
    steps: int = 0,
    depth: int = 0,
    options: Sequence[str] = (),
) -> Speeds:
    """The same with llama.cpp's `llama-bench`: a process, with its own warm-up, for each repetition."""
    arguments = ["-m", str(model), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json"]
    arguments += ["-p", str(prompt), "-n", str(steps), "-d", str(depth), *options]
    while True:
        text = run_program(program, arguments)
        try:
            speed = float(json.loads(text)[0]["avg_ts"])
        except (ValueError, LookupError, TypeError):
            raise HerdError(f"{Path(program).name} did not print its result as JSON{_last_lines(text)}") from None
        yield speed


def run_program(program: str, arguments: Sequence[str]) -> str:
    """Standard output of a program; HerdError with its last lines when it fails."""
    name = Path(program).name
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise HerdError(f"{name} cannot be started ({error.strerror})", value=program) from None
    if result.returncode:
        how = (
            f"ended with code {result.returncode}" if result.returncode > 0 else f"died of signal {-result.returncode}"
        )
        raise HerdError(f"{name} {how}{_last_lines(result.stderr or result.stdout)}")
    return result.stdout


def _last_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    shown = "".join("\n  " + "".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)
    return f", its last lines:{shown}" if shown else ", and printed nothing"


def _random(rng: np.random.Generator, backend: Backend, count: int) -> list[int]:
    ids: list[int] = rng.integers(backend.config.vocab_size, size=count).tolist()
    return ids


def _open(backend: Backend, tokens: int) -> int:
    """An empty sequence with room for so many tokens."""
    reserved = backend.reserve(tokens)
    return _with_room(backend, None if reserved is None else reserved[0], tokens)


def _with_room(backend: Backend, sequence: int | None, tokens: int) -> int:
    if sequence is not None:
        if backend.grow(sequence, tokens):
            return sequence
        backend.release(sequence)
    raise ResourceError("the cache has no room for that many sequences of this length", fix="free memory, or fewer")


def _timed_prefill(backend: Backend, tokens: list[int]) -> float:
    sequence = _open(backend, len(tokens))
    try:
        start = time.perf_counter()
        backend.step([Span(sequence, tokens)])
        return time.perf_counter() - start
    finally:
        backend.release(sequence)


def _timed_decode(backend: Backend, roots: list[int], steps: list[list[int]]) -> float:
    """Seconds to append one token to a copy of every root, in each of the steps."""
    copies: list[int] = []
    try:
        for root in roots:
            copies.append(_with_room(backend, backend.fork(root, len(steps)), len(steps)))
        start = time.perf_counter()
        for tokens in steps:
            backend.step([Span(copy, (token,)) for copy, token in zip(copies, tokens, strict=True)])
        return time.perf_counter() - start
    finally:
        for copy in copies:
            backend.release(copy)
