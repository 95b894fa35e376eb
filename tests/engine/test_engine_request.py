"""Sampling options from outside: names, bounds, Python's numbers and numpy's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest

from herd.engine.request import Sampling, SamplingOptions
from herd.errors import UsageError


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"seed": -1},
        {"top_logprobs": 21},
        {"logprobs": 5},
        {"stop": ["", "x"]},
        {"stop": ["x"] * 17},
        {"stop": 5},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": [1]},
        {"stop_token_ids": 3},
        {"stop_token_ids": [-3]},
        {"temprature": 1.0},
    ],
)
def test_wrong_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling.from_options(options)
    assert next(iter(options)).split("_")[0] in str(caught.value) or "temperature" in str(caught.value)


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint64])
def test_numbers_of_numpy_are_numbers(number: Callable[[int], object]) -> None:
    """What is kept of them has Python's types, and the same bounds."""
    names = ["temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"]
    names += ["frequency_penalty"]
    whole = ["max_tokens", "top_k", "seed", "top_logprobs"] if np.issubdtype(number, np.integer) else []
    kept = Sampling.from_options(dict.fromkeys(names + whole, number(1)) | {"logit_bias": {3: number(1)}})
    assert kept == Sampling.from_options(dict.fromkeys(names + whole, 1) | {"logit_bias": {3: 1}})
    assert {type(getattr(kept, name)) for name in names + whole} == {int if whole else float}
    for wrong in [*({name: number(101)} for name in names), {"logit_bias": {3: number(101)}}]:
        with pytest.raises(UsageError, match="out of range"):
            Sampling.from_options(wrong)
    for name in () if whole else ("max_tokens", "top_k", "seed", "top_logprobs"):
        with pytest.raises(UsageError, match="is no whole number"):
            Sampling.from_options({name: number(1)})


def test_token_ids_of_numpy_are_token_ids() -> None:
    ids = np.array([5, 3])
    kept = Sampling.from_options({"stop_token_ids": ids, "logit_bias": {ids[0]: 1.0}})
    assert kept == Sampling(stop_token_ids=(5, 3), logit_bias={5: 1.0})
    assert {type(i) for i in (*kept.stop_token_ids, *(kept.logit_bias or ()))} == {int}


def test_truth_values_of_numpy_are_truth_values_and_no_numbers() -> None:
    switches = ("logprobs", "ignore_eos", "skip_specials")
    kept = Sampling.from_options(dict.fromkeys(switches, np.True_))
    assert all(getattr(kept, name) is True for name in switches)
    for truth in (True, np.True_):
        for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "top_logprobs"):
            with pytest.raises(UsageError, match=f"{name} is no "):
                Sampling.from_options({name: truth})
        with pytest.raises(UsageError, match="bias"):
            Sampling.from_options({"logit_bias": {3: truth}})
        with pytest.raises(UsageError, match="token id"):
            Sampling.from_options({"stop_token_ids": [truth]})
    with pytest.raises(UsageError, match="logprobs is a switch"):
        Sampling.from_options({"logprobs": np.int64(1)})


def test_n_is_said_to_be_for_generate_and_chat() -> None:
    with pytest.raises(UsageError, match=r"got n; .*to fix: only generate and chat take n"):
        Sampling.from_options({"n": 2})


def test_option_names_are_the_same_everywhere() -> None:
    assert set(SamplingOptions.__annotations__) == {f.name for f in fields(Sampling)}
