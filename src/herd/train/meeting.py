"""The ranks of one attempt find each other, and a place at their store where no earlier attempt has left anything.

torchrun keeps one store for all attempts of a run (PyTorch 2.13 puts nothing of an attempt into the keys). A rank that
reads another's address there before that one has written its new one waits at a dead address, for ever or until it is
refused; an old "done" lets it go on too early. The number of restarts cannot tell the attempts apart either: a node
that was replaced begins to count anew. So every rank brings a name that nobody had before, and rank 0 answers those.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

from herd.errors import ResourceError

PATIENCE = timedelta(minutes=30)
"""As long as PyTorch gives ranks to come: on many nodes some start late."""
_POLL_SECONDS = 0.05


def meet(store: Store, rank: int, size: int, patience: timedelta = PATIENCE) -> Store:
    """The part of `store` that this attempt's ranks have for themselves, as soon as all of them are there.

    Raises ResourceError when they are not within `patience`.
    """
    name = uuid.uuid4().hex
    place = _gather(store, name, size, patience) if rank == 0 else _come(store, name, rank, patience)
    return PrefixStore(f"herd/attempt/{place}", store)


def _come(store: Store, name: str, rank: int, patience: timedelta) -> str:
    store.set(_here(rank), name)
    try:
        store.wait([_answer(name)], patience)
    except DistStoreError:
        raise ResourceError(
            f"rank 0 has not come within {patience.total_seconds():g} s", fix="look at what it says"
        ) from None
    place: str = store.get(_answer(name)).decode()
    store.set(_seen(place, rank), "")
    return place


def _gather(store: Store, place: str, size: int, patience: timedelta) -> str:
    """Answer every name there is, those of an earlier attempt as well, until every rank has read its answer."""
    missing = set(range(1, size))
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        missing = {rank for rank in missing if not store.check([_seen(place, rank)])}
        if not missing:
            return place
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{len(missing)} of {size} ranks have not come within {patience.total_seconds():g} s",
                value=f"rank {min(missing)}" + (" and others" if len(missing) > 1 else ""),
                fix="look at what they say",
            )
        for rank in missing:
            if store.check([_here(rank)]):
                store.set(_answer(store.get(_here(rank)).decode()), place)
        time.sleep(_POLL_SECONDS)


def _here(rank: int) -> str:
    return f"herd/here/{rank}"


def _answer(name: str) -> str:
    return f"herd/answer/{name}"


def _seen(place: str, rank: int) -> str:
    return f"herd/seen/{place}/{rank}"
