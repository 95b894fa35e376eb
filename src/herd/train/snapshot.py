"""A run's whole state as data: out of the trainer into a checkpoint, and back."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from herd.errors import HerdError, UsageError
from herd.train.announce import announce, first_line
from herd.train.config import FREE_TO_CHANGE

if TYPE_CHECKING:
    from herd.train.trainer import Trainer

_COUNTERS = ("step", "cursor", "tokens", "supervised", "seconds")


def capture(trainer: Trainer[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, JSON values): weights, optimiser, random generators, callbacks, counters and the configuration.

    The tensors are the live ones: they must be written before the next step. The schedule has no state of its own.
    """
    tensors = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state(trainer.model),
        "random": torch.get_rng_state(),
        "callbacks": {callback.name: callback.state() for callback in trainer.callbacks if callback.name},
    }
    version, internal, gauss = random.getstate()
    values = {
        **{name: getattr(trainer, name) for name in _COUNTERS},
        "recent": list(trainer.recent),
        "random": [version, list(internal), gauss],
        "config": trainer.config.model_dump(mode="json"),
        "data": trainer.data,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return tensors, values


def restore(trainer: Trainer[Any], tensors: dict[str, Any], values: dict[str, Any]) -> None:
    """Put a captured state back. Raises UsageError when it belongs to a run of another configuration or data."""
    _same_run(trainer, values)
    saved = {name: state for name, state in tensors["callbacks"].items() if state}
    if missing := set(saved) - {callback.name for callback in trainer.callbacks}:
        raise UsageError(
            f"{trainer.store.directory} was trained with {', '.join(sorted(missing))}",
            fix=f"train into another directory, or remove {trainer.store.directory}",
        )
    try:
        trainer.model.load_state_dict(tensors["model"])
    except RuntimeError as error:
        raise HerdError(
            f"the weights in {trainer.store.directory} do not fit this model",
            value=first_line(error),
            fix=f"train into another directory, or remove {trainer.store.directory}",
        ) from None
    trainer.optimizer.load_state(trainer.model, tensors["optimizer"])
    for callback in trainer.callbacks:
        if callback.name in saved:
            callback.load_state(saved[callback.name])
    torch.set_rng_state(tensors["random"])
    version, internal, gauss = values["random"]
    random.setstate((version, tuple(internal), gauss))
    for name in _COUNTERS:
        setattr(trainer, name, values[name])
    trainer.recent = deque((tuple(pair) for pair in values["recent"]), maxlen=trainer.recent.maxlen)


def _same_run(trainer: Trainer[Any], values: dict[str, Any]) -> None:
    """Refuse a state that was made otherwise: its continuation would be neither run."""
    now, directory = trainer.config.model_dump(mode="json"), trainer.store.directory
    for name, old in values["config"].items():
        if name in now and name not in FREE_TO_CHANGE and now[name] != old:
            raise UsageError(
                f"{directory} was trained with {name}={old}",
                value=f"{name}={now[name]}",
                fix=f"use {name}={old}, train into another directory, or remove {directory}",
            )
    if values.get("data", trainer.data) != trainer.data:
        raise UsageError(
            f"{directory} was trained on other data",
            fix=f"train into another directory, or remove {directory}",
        )
    for name, current in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
        if values[name] != current:
            announce(f"continuing with {name} {current} instead of {values[name]}: the last bits may differ")
