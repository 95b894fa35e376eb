"""Learning rates against transformers' schedules and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from herd.config import parse_config
from herd.errors import UsageError
from herd.train import TrainConfig, lr_factor


def _curve(**fields: object) -> list[float]:
    config = TrainConfig.model_validate(fields)
    return [lr_factor(step, config.steps, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_equals_transformers(schedule: str) -> None:
    """transformers counts the decay from 0 and reaches the end one step after the last; ours reaches it at the last."""
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    steps, warmup = 50, 10
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[schedule]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = make(optimizer, warmup, warmup + (steps - warmup))
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    ours = _curve(steps=steps, warmup=warmup, schedule=schedule, final_lr_ratio=0.0)
    assert ours == pytest.approx(rates[1:], abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_may_end_before_its_schedule_does(schedule: str) -> None:
    longer = _curve(steps=100, warmup=0.1, schedule=schedule)
    assert _curve(steps=90, warmup=0.1, schedule=schedule, schedule_steps=100) == longer[:90]
    annealed = _curve(steps=95, warmup=0.1, schedule=schedule, schedule_steps=100, anneal=5)
    assert annealed[:90] == longer[:90]
    assert annealed[90:] == pytest.approx([longer[89] * (4 - i) / 5 for i in range(5)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_rises_then_falls_to_the_final_ratio(schedule: str, steps: int) -> None:
    ours = _curve(steps=steps, warmup=0.1, schedule=schedule, final_lr_ratio=0.25)
    warmup = round(0.1 * steps)
    assert max(ours) <= 1
    assert ours[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert all(a >= b for a, b in zip(ours[warmup:], ours[warmup + 1 :], strict=False))
    assert ours[-1] == pytest.approx(0.25)


def test_cosine_midpoint_and_wsd_plateau() -> None:
    cosine = _curve(steps=101, warmup=0, schedule="cosine", final_lr_ratio=0.1)
    assert cosine[49] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 50 / 101)) / 2)
    wsd = _curve(steps=100, warmup=10, schedule="wsd", decay=0.2, final_lr_ratio=0.0)
    assert wsd[10:80] == [1.0] * 70
    assert wsd[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])
    assert set(_curve(steps=20, warmup=0, schedule="constant")) == {1.0}


@pytest.mark.parametrize("field", ["lr", "warmup", "weight_decay", "spike_factor"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinity_is_no_setting(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field!r} is not valid.*finite"):
        parse_config(TrainConfig, {field: value}, "test")


def test_fields_that_contradict_each_other_are_named() -> None:
    with pytest.raises(UsageError, match=r"^test: micro_batch 9 is larger than batch_size 8$"):
        parse_config(TrainConfig, {"micro_batch": 9, "batch_size": 8}, "test")


def test_bad_configurations_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"'lr' is not valid.*greater than 0"):
        parse_config(TrainConfig, {"lr": -1}, "test")
    with pytest.raises(UsageError, match="did you mean 'weight_decay'"):
        parse_config(TrainConfig, {"weight_decai": 0.1}, "test")
    with pytest.raises(UsageError, match="micro_batch 32 is larger than batch_size 16"):
        parse_config(TrainConfig, {"micro_batch": 32, "batch_size": 16}, "test")


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())
