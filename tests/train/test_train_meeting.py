"""Ranks of several attempts at one store, as torchrun keeps it: each attempt has a place of its own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, Store

from herd.errors import ResourceError
from herd.train.meeting import meet

SIZE = 4
PATIENCE = timedelta(seconds=20)


def attempt(store: Store, late: int) -> list[Store]:
    """What every rank gets; the rank `late` comes when the others have long been waiting."""

    def come(rank: int) -> Store:
        time.sleep(0.3 * (rank == late))
        return meet(store, rank, SIZE, PATIENCE)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(come, range(SIZE)))


@pytest.mark.parametrize("late", [0, 1, SIZE - 1])
def test_every_attempt_has_a_place_that_all_its_ranks_share(late: int) -> None:
    store = HashStore()
    for number in range(3):
        places = attempt(store, late)
        assert not any(place.check(["address"]) for place in places), "left by the attempt before"
        places[number].set("address", str(number))
        assert all(place.get("address") == str(number).encode() for place in places)


def test_a_rank_that_died_before_it_met_the_others() -> None:
    """Its name is still there, and rank 0 of the next attempt may read it first."""
    store = HashStore()
    with pytest.raises(ResourceError, match=r"rank 0 has not come within 0.1 s"):
        meet(store, 2, SIZE, timedelta(seconds=0.1))
    for slow in (2, 0):
        first, *others = attempt(store, slow)
        first.set("address", "new")
        assert all(isinstance(place, PrefixStore) and place.check(["address"]) for place in others)


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(ResourceError, match=r"3 of 4 ranks have not come within 0.2 s; got rank 1 and others"):
        meet(HashStore(), 0, SIZE, timedelta(seconds=0.2))
