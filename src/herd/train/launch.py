"""Several ranks on one recipe, started by torchrun: rank 0 runs it, and all of them run the stages that train.

    torchrun --nproc-per-node 8 -m herd run recipes/mine.yaml base.train.parallel.tp=8

Between those stages the others wait, for as long as it takes, at the store that torchrun's ranks share. A rank that
does not answer in a collective for `HERD_RANK_TIMEOUT` seconds (600) ends the attempt; torchrun --max-restarts N starts
all ranks again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from herd.errors import UsageError

_FOREVER = timedelta(days=365)


class Ranks:
    """The ranks that torchrun started, or this process alone. `rank` 0 leads."""

    def __init__(self) -> None:
        self.rank, self.size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self._calls = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

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
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        while True:
            key = f"herd/stage/{self._calls}"
            store.wait([key], _FOREVER)
            self._calls += 1
            if not (stage := store.get(key).decode()):
                return
            yield stage

    def _say(self, stage: str) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        _get_default_store().set(f"herd/stage/{self._calls}", stage)
        self._calls += 1


@contextlib.contextmanager
def started_ranks() -> Iterator[Ranks]:
    """The ranks for the length of a run; their process group is there from the beginning to the end.

    Raises UsageError for an environment that torchrun would not have made.
    """
    ranks = Ranks()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_number("LOCAL_RANK", 0))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield ranks
        if ranks.leads:
            ranks.dismiss()
        dist.barrier()
    finally:
        dist.destroy_process_group()


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
