"""Checkpoints written beside the training hold the state of their step, though the weights have moved on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.errors import HerdError
from herd.train import Callback, StepRecord, Trainer
from herd.train.tensor_files import read_tensors
from tests.train.parallel.cases import Case, trainer
from tests.train.parallel.launch import launch

HERE = "tests.train.parallel.test_parallel_background"
FIELDS: dict[str, Any] = {"steps": 8, "checkpoint_every": 2, "keep": 10, "log_every": 1}


def both(rank: int, out: Path, parallel: dict[str, Any], ranks: int) -> None:
    """The same run with checkpoints in between and beside."""
    for name, background in (("between", False), ("beside", True)):
        torch.manual_seed(0)  # the state of the random generator is part of the first checkpoint
        trainer(Case("tied", ranks, parallel), out / name, [], checkpoint_background=background, **FIELDS).fit()


@pytest.mark.parametrize("ranks, parallel", [(1, {}), (2, {"shard": True})], ids=["one", "fsdp"])
def test_every_checkpoint_is_that_of_its_step(ranks: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    if ranks == 1:
        both(0, tmp_path, parallel, ranks)
    else:
        launch(ranks, f"{HERE}:both", tmp_path, parallel=parallel, ranks=ranks)
    steps = sorted(path.name for path in (tmp_path / "between/state").glob("step-*"))
    assert len(steps) == 5
    for step in steps:
        between, beside = (read_tensors(tmp_path / name / "state" / step) for name in ("between", "beside"))
        assert between.keys() == beside.keys() and len(between) >= 39
        assert all(torch.equal(between[name], beside[name]) for name in between), step


def test_the_training_goes_on_while_one_is_written(tmp_path: Path) -> None:
    loop = trainer(Case("dense", 1, {}), tmp_path, [], checkpoint_background=True, **FIELDS)
    written, release = [], threading.Event()
    write = loop.store._world.write_tensors

    def slow(directory: Path, tensors: dict[str, Tensor]) -> None:
        assert release.wait(60)
        written.append(loop.step)
        write(directory, tensors)

    loop.store._world.write_tensors = slow  # type: ignore[method-assign]
    loop.save()
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.train_step()
    assert not written and loop.step == 1
    release.set()
    loop.saver.finish()
    assert written == [1] and loop.store.steps() == [0]
    found = loop.store.load_newest({})
    assert found is not None
    assert all(torch.equal(found[0][f"model/{name}"], weight) for name, weight in before.items())


def test_an_error_of_the_training_waits_for_what_is_being_written(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
            if record.step == 3:
                raise HerdError("the third step")

    loop = trainer(Case("dense", 1, {}), tmp_path, [Fails()], checkpoint_background=True, **FIELDS)
    write = loop.store._world.write_tensors

    def slow(directory: Path, tensors: dict[str, Tensor]) -> None:
        time.sleep(0.5)
        write(directory, tensors)

    loop.store._world.write_tensors = slow  # type: ignore[method-assign]
    with pytest.raises(HerdError, match="the third step"):
        loop.fit()
    assert loop.store.steps() == [0, 2]


def test_what_went_wrong_beside_is_said_at_the_next_one(tmp_path: Path) -> None:
    loop = trainer(Case("dense", 1, {}), tmp_path, [], checkpoint_background=True, **FIELDS)

    def full(directory: Path, tensors: dict[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    loop.store._world.write_tensors = full  # type: ignore[method-assign]
    loop.save()
    with pytest.raises(OSError, match="No space left"):
        loop.save()
