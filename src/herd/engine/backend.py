"""What the engine asks of a backend, and which backends there are.

A backend holds the weights and the key/value cache. It knows nothing of text, sampling or requests: the scheduler
reserves room for a sequence, appends tokens to any number of sequences in one ragged step, and gets logits back.
A prompt is a long span, a generated token a span of one; both may stand in the same step.
Room may be given as it is needed: then `grow` can fail, and the scheduler takes back a sequence and computes it again.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from herd.architecture import LlamaConfig
from herd.cgroup import usable_cpus
from herd.engine.request import check_whole
from herd.errors import HerdError, MissingDependency, ResourceError, UsageError
from herd.progress import status

if TYPE_CHECKING:
    from herd.checkpoint import Adapter

T = TypeVar("T")
KvType = Literal["bf16", "f32", "int8"]


@dataclass(frozen=True)
class BackendOptions:
    """How to load a model; the arguments of `herd.LLM` after checking."""

    path: Path
    quant: str | None
    ctx: int | None
    threads: int | None
    kv: KvType
    cpus: tuple[int, ...] = ()
    """Processors to bind threads to, one each (native backend); the calling thread stays where it is."""
    page_tokens: int = 64
    """Tokens of a page of the cache, a multiple of 16 (native backend)."""
    promised: int = 0
    """Bytes of the free memory that another model of this process was promised and has not taken yet."""
    memory: int | None = None
    """Bytes that weights, cache and working space may take together; None: what is free."""


@dataclass(frozen=True)
class Span:
    """Tokens to append to one sequence in a step. `sequence` is the number `Backend.reserve` gave.

    `outputs`: how many of the last tokens logits are wanted after.
    """

    sequence: int
    tokens: Sequence[int]
    outputs: int = 1


class Backend(Protocol):
    """Runs a model over the cached sequences it has reserved. Not thread-safe: the caller takes turns."""

    config: LlamaConfig
    context: int
    """Tokens a sequence may have at most."""
    max_sequences: int
    """Sequences that may be reserved at the same time."""
    threads: int
    """Threads that compute."""
    identity: str
    """What decides about bits beside the files and the options: kernels, device, library."""
    promised: int
    """Bytes of memory that it will take at most, beside what it had when it was loaded."""
    memory: int
    """Bytes that weights, cache and working space take together at most."""

    @property
    def cache_pages(self) -> tuple[int, int]:
        """Pages of the cache that reserved sequences have, and all there are; another thread may ask."""

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Make a low-rank adapter known by a name. Raises HerdError when this backend cannot apply it."""

    def unload_adapter(self, name: str) -> None:
        """Free an adapter that no reserved sequence has."""

    def reserve(
        self, capacity: int, prompt: Sequence[int] = (), adapter: str | None = None, salt: str = ""
    ) -> tuple[int, int] | None:
        """A new sequence of up to `capacity` tokens; None when there is no room before another is released.

        Returns its number, and how many of the first tokens of `prompt` it holds already: never all of them, and none
        that were computed with another `salt`. When no sequence is reserved, a capacity up to `context` always
        succeeds.
        """

    def fork(self, sequence: int, capacity: int) -> int | None:
        """A new sequence that begins with everything `sequence` holds; None when there is no room."""

    def grow(self, sequence: int, n_tokens: int) -> bool:
        """Room for `n_tokens` more tokens of a sequence; False when another one must give room first."""

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence; what is forgotten was appended by the last step."""

    def release(self, sequence: int) -> None:
        """Give a sequence's room back."""

    def step(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        """Append every span to its sequence (each sequence at most once).

        Returns the logits after the last `outputs` tokens of each span, [sum of outputs, V]; the array is the caller's.
        """

    def score(
        self, sequences: Sequence[Sequence[int]], vocabulary: int | None = None, adapter: str | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """ln P of tokens 1.. of each sequence (at most `context` tokens). Raises CacheFull without room now.

        `vocabulary`: rows of the head beyond it are padding, no token of the sequences among them (None: there are
        none). `adapter`: with the change of this name applied.
        """

    def embed(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> npt.NDArray[np.float32]:
        """Mean of the final hidden states of each sequence, [len(sequences), D]. Raises CacheFull as `score` does."""

    def embed_in_pieces(
        self, tokens: Sequence[int], adapter: str | None = None
    ) -> Generator[None, int, npt.NDArray[np.float32]]:
        """`embed` of one sequence, [D], a piece at a time: each `send(n)` computes up to n more of its tokens.

        Steps may run in between. Takes room for all of them at once, or raises CacheFull; it is given back at the end,
        or by `close()`.
        """

    def settle(self) -> None:
        """Return when nothing is done beside the steps any more, for measurements."""

    def close(self) -> None:
        """Free the weights and the cache."""


def thread_count(asked: int | None) -> int:
    """Threads to run with: those asked for, but no more than processors, on which they would only take turns."""
    usable = usable_cpus()
    return usable if asked is None else min(asked, usable)


def checked_cpus(cpus: Sequence[int]) -> tuple[int, ...]:
    """Processors to bind threads to. Raises UsageError unless they are different ones that this process may use."""
    if not isinstance(cpus, Sequence) or isinstance(cpus, str):
        raise UsageError("cpus is no list of processors", value=cpus, allowed="a list of their numbers")
    cpus = tuple(check_whole("a processor's number", cpu, 0, 1023) for cpu in cpus)
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    beyond = [cpu for cpu in cpus if usable is not None and cpu not in usable]
    if beyond:
        raise UsageError(
            "no such processor for this process", value=beyond[0], allowed=", ".join(map(str, usable or ()))
        )
    if len(set(cpus)) < len(cpus):
        raise UsageError("a processor is named twice", value=list(cpus), allowed="one for each thread")
    return cpus


# In the order of preference of "auto": name -> (module with `open_backend(options)`, the module that it needs).
BACKENDS = {
    "native": ("herd.engine.native_backend", "herd._native"),
    "torch": ("herd.engine.torch_backend", "torch"),
}


def context_of(config: LlamaConfig, options: BackendOptions) -> int:
    """Tokens of context that were asked for. Raises UsageError when the model has not so many."""
    if options.ctx is not None and options.ctx > config.context_length:
        raise UsageError(
            "ctx is beyond the model's context", value=options.ctx, allowed=f"1 to {config.context_length}"
        )
    return config.context_length if options.ctx is None else options.ctx


def open_backend(name: str, options: BackendOptions) -> Backend:
    """Load a model with the backend `name`, or with the first that can run here for "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise UsageError("no such backend", value=name, allowed=", ".join(["auto", *BACKENDS]))
    on_gpu = name == "auto" and _suits_gpu(options) and _gpu_is_there()
    candidates = ["torch", "native"] if on_gpu else list(BACKENDS) if name == "auto" else [name]
    for candidate in candidates:
        module, needed = BACKENDS[candidate]
        if importlib.util.find_spec(needed) is not None:
            try:
                backend: Backend = importlib.import_module(module).open_backend(options)
            except ResourceError:
                if not on_gpu or candidate == "native":
                    raise
                continue  # too large for the GPU
            finally:
                status("")  # of the memory plan that was shown while loading
            return backend
    if name == "native":
        raise HerdError("Herd's compiled part is missing", fix="herd doctor says why")
    raise MissingDependency("torch", extra="train")


def _suits_gpu(options: BackendOptions) -> bool:
    """What was asked for is something that the torch backend has."""
    return options.quant in (None, "f32", "bf16") and options.kv in ("f32", "bf16") and not options.cpus


def _gpu_is_there() -> bool:
    """Whether torch sees a GPU. It is only imported, which takes seconds, where there is a driver."""
    if not (Path("/dev/nvidiactl").exists() and importlib.util.find_spec("torch")):
        return False
    import torch

    return torch.cuda.is_available()


def begun(pieces: Generator[None, int, T]) -> Generator[None, int, T]:
    """Work in pieces, from where it has what it needs."""
    next(pieces)
    return pieces


class CacheFull(HerdError):
    """Running sequences hold the room that a call needs; it works once they have given it back."""

    def __init__(self) -> None:
        super().__init__("the cache is full of running sequences", fix="try again when some have ended")


class EngineClosed(HerdError):
    """The model was used after `close()`."""

    def __init__(self) -> None:
        super().__init__("this model is closed", fix="load it again with herd.LLM(path)")
