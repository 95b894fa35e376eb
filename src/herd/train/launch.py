"""Several ranks on one recipe, started by torchrun: rank 0 runs it, and all of them run the stages that train.

    torchrun --nproc-per-node 8 -m herd run recipes/mine.yaml base.train.parallel.tp=8

Between those stages the others wait, for as long as it takes, at the store that torchrun's ranks share. A rank that
does not answer in a collective for `HERD_RANK_TIMEOUT` seconds (600) ends the attempt; torchrun --max-restarts N starts
all ranks again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from herd.errors import HerdError, UsageError

T = TypeVar("T")
_FOREVER = timedelta(days=365)
_SAID_SECONDS = 10
_number_of_signal = itertools.count()


class Ranks:
    """The ranks that torchrun started, or this process alone. `rank` 0 leads."""

    def __init__(self) -> None:
        self.rank, self.size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self._calls = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def started_as(self, command: str) -> str:
        """How a `herd` command starts these ranks."""
        if self.size == 1:
            return command
        local = _number("LOCAL_WORLD_SIZE", self.size)
        nodes = f"--nnodes {self.size // local} " if local < self.size else ""
        return f"torchrun {nodes}--nproc-per-node {local} -m {command}"

    def call(self, stage: str) -> None:
        """Rank 0: let all run a stage now."""
        if self.size > 1:
            self._say(stage)

    def dismiss(self) -> None:
        """Rank 0: there is nothing more to run."""
        if self.size > 1:
            self._say("")

    def follow(self) -> Iterator[str]:
        """The others: the stages that rank 0 calls for, until it has no more."""
        store = _store()
        while True:
            key = f"herd/stage/{self._calls}"
            store.wait([key], _FOREVER)
            self._calls += 1
            if not (stage := store.get(key).decode()):
                return
            yield stage

    def _say(self, stage: str) -> None:
        _store().set(f"herd/stage/{self._calls}", stage)
        self._calls += 1


@contextlib.contextmanager
def started_ranks() -> Iterator[Ranks]:
    """The ranks for the length of a run; their process group is there from the beginning to the end.

    What goes wrong on every rank is said by rank 0, whose end ends the others: they leave it some seconds for that.
    Raises UsageError for an environment that torchrun would not have made.
    """
    ranks = Ranks()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from herd.train.meeting import meet

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_number("LOCAL_RANK", 0))
    shared, _, _ = next(rendezvous("env://"))
    store = meet(shared, ranks.rank, ranks.size)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    try:
        yield ranks
        if ranks.leads:
            ranks.dismiss()
        dist.barrier()
    except HerdError:
        if not ranks.leads:
            time.sleep(_SAID_SECONDS)
        raise
    finally:
        dist.destroy_process_group()


class Signal:
    """A place at the store where ranks wait for one of them, however long it takes. All must make them in one order."""

    def __init__(self) -> None:
        self._key = f"herd/signal/{next(_number_of_signal)}"

    def give(self, name: str, text: str = "") -> None:
        _store().set(f"{self._key}/{name}", text)

    def wait(self, name: str) -> str:
        key, store = f"{self._key}/{name}", _store()
        store.wait([key], _FOREVER)
        said: str = store.get(key).decode()
        return said


def first_alone(action: Callable[[], T], rank: int) -> T | None:
    """Let rank 0 do something while the others wait; what it returns there. If it fails, it fails on every rank."""
    signal = Signal()
    if rank:
        if signal.wait("done"):
            raise HerdError("rank 0 failed, and says why")
        return None
    failed = True
    try:
        result = action()
        failed = False
        return result
    finally:
        signal.give("done", "failed" if failed else "")


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def limit_waiting() -> None:
    """From now on no rank waits longer for the others than `HERD_RANK_TIMEOUT` seconds, in any group there is.

    For when all have found each other: starting may take longer.
    """
    from torch.distributed import distributed_c10d

    timeout = timedelta(seconds=_number("HERD_RANK_TIMEOUT", 600))
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment is not a number", value=text, allowed="as torchrun sets it")
    return int(text)
