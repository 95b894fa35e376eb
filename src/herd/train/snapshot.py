"""A run's whole state as data: out of the trainer into a checkpoint, and back."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from herd.errors import HerdError, UsageError
from herd.train.announce import announce, first_line
from herd.train.config import FREE_TO_CHANGE

if TYPE_CHECKING:
    from herd.train.trainer import Trainer

_COUNTERS = ("step", "cursor", "tokens", "supervised", "seconds")


def capture(trainer: Trainer[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values): weights, optimiser, random generators, callbacks, counters and the configuration.

    The tensors are the live ones: they must be written before the next step. The schedule has no state of its own.
    Names are paths: model/NAME, optimizer/NAME/FIELD, callbacks/CALLBACK/FIELD/NAME, where NAME is a parameter's.
    """
    tensors = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for name, fields in trainer.optimizer.state(trainer.model).items():
        tensors |= {f"optimizer/{name}/{field}": tensor for field, tensor in fields.items()}
    tensors["random"] = torch.get_rng_state()
    remembered: dict[str, dict[str, Any]] = {}
    for callback in trainer.callbacks:
        for field, value in callback.state().items() if callback.name else ():
            if isinstance(value, dict) and any(isinstance(x, Tensor) for x in value.values()):
                tensors |= {f"callbacks/{callback.name}/{field}/{name}": tensor for name, tensor in value.items()}
            else:
                remembered.setdefault(callback.name, {})[field] = value
    version, internal, gauss = random.getstate()
    values = {
        **{name: getattr(trainer, name) for name in _COUNTERS},
        "recent": list(trainer.recent),
        "random": [version, list(internal), gauss],
        "callbacks": remembered,
        "config": trainer.config.model_dump(mode="json"),
        "data": trainer.data,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return tensors, values


def restore(trainer: Trainer[Any], tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a captured state back. Raises UsageError when it belongs to a run of another configuration or data."""
    _same_run(trainer, values)
    saved: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["callbacks"].items()}
    for name, fields in _below(tensors, "callbacks").items():
        saved.setdefault(name, {}).update(fields)
    if missing := set(saved) - {callback.name for callback in trainer.callbacks}:
        raise UsageError(
            f"{trainer.store.directory} was trained with {', '.join(sorted(missing))}",
            fix=f"go on with it, train into another directory, or remove {trainer.store.directory}",
        )
    try:
        trainer.model.load_state_dict(_below(tensors, "model"))
    except RuntimeError as error:
        raise HerdError(
            f"the weights in {trainer.store.directory} do not fit this model",
            value=first_line(error),
            fix=f"train into another directory, or remove {trainer.store.directory}",
        ) from None
    trainer.optimizer.load_state(trainer.model, _below(tensors, "optimizer"))
    for callback in trainer.callbacks:
        if callback.name in saved:
            callback.load_state(saved[callback.name])
    torch.set_rng_state(tensors["random"])
    version, internal, gauss = values["random"]
    random.setstate((version, tuple(internal), gauss))
    for name in _COUNTERS:
        setattr(trainer, name, values[name])
    trainer.recent = deque((tuple(pair) for pair in values["recent"]), maxlen=trainer.recent.maxlen)


def _below(tensors: dict[str, Tensor], place: str) -> dict[str, Any]:
    """What lies below a path, as nested dictionaries."""
    found: dict[str, Any] = {}
    for path, tensor in tensors.items():
        first, *rest = path.split("/")
        if first != place:
            continue
        inner = found
        for folder in rest[:-1]:
            inner = inner.setdefault(folder, {})
        inner[rest[-1]] = tensor
    return found


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
