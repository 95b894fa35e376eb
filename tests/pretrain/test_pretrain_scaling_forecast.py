"""The two-step forecast: known curves come back, brute force as the oracle, intervals that hold, wrong tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from herd.errors import FileFormatError, UsageError
from herd.pretrain.scaling import Model, fit_benchmark, read_models

LADDER = (6e18, 3e19, 1e20, 6e20, 3e21, 1e22)
OTHERS = (1.36, 1.32, 1.29, 1.26)
"""NLLs of models of another family, whose compute does not count."""


def _nll(flops: float) -> float:
    return float(1.95 - 0.027 * np.log10(flops))


def _accuracy(nll: float) -> float:
    return float(0.25 + 0.75 / (1 + np.exp(20 * (nll - 1.32))))


def _models(noise: float = 0.0, seed: int = 0) -> list[Model]:
    rng = np.random.default_rng(seed)
    nlls = [_nll(flops) + 0.2 * noise * rng.normal() for flops in LADDER]
    flops = [*LADDER, *(None for _ in OTHERS)]
    return [
        Model(c, nll, _accuracy(nll) + noise * rng.normal()) for c, nll in zip(flops, [*nlls, *OTHERS], strict=True)
    ]


def test_known_curves_come_back_and_meet_far_beyond_the_ladder() -> None:
    benchmark = fit_benchmark(_models(), chance=0.25)
    assert (benchmark.intercept, benchmark.slope) == pytest.approx((1.95, -0.027), rel=1e-9)
    assert (benchmark.steepness, benchmark.middle) == pytest.approx((20, 1.32), rel=1e-7)
    forecast = benchmark.forecast(3.8e25)
    assert forecast.nll.value == pytest.approx(_nll(3.8e25), rel=1e-9)
    assert forecast.accuracy.value == pytest.approx(_accuracy(_nll(3.8e25)), rel=1e-7)
    assert forecast.extrapolation == pytest.approx(3800)


def test_step_one_counts_only_models_with_compute_and_step_two_all_with_accuracy() -> None:
    models = _models()
    far = fit_benchmark([*models, Model(None, 9.0, None)], chance=0.25)  # counts for neither
    assert far.slope == pytest.approx(-0.027) and far.middle == pytest.approx(1.32)
    without = fit_benchmark([*models, Model(1e19, _nll(1e19) + 0.1, None)], chance=0.25)
    assert without.intercept != pytest.approx(1.95, rel=1e-3) and without.middle == pytest.approx(1.32)
    moved = fit_benchmark([*models, Model(None, 1.30, 0.9)], chance=0.25)
    assert moved.intercept == pytest.approx(1.95) and moved.middle != pytest.approx(1.32, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_sigmoid_is_the_best_that_brute_force_finds(seed: int) -> None:
    models = _models(noise=0.05, seed=seed)
    benchmark = fit_benchmark(models, chance=0.25)
    nll, accuracy = np.array([m.nll for m in models]), np.array([m.accuracy for m in models])

    def squares(steepness: float, middle: float) -> float:
        return float(((accuracy - 0.25 - 0.75 / (1 + np.exp(steepness * (nll - middle)))) ** 2).sum())

    grid = itertools.product(np.geomspace(2, 200, 300), np.linspace(1.1, 1.5, 401))
    best = min(squares(*point) for point in grid)
    ours = squares(benchmark.steepness, benchmark.middle)
    assert best * 0.99 <= ours <= best * (1 + 1e-9)


def test_intervals_hold_what_they_promise() -> None:
    inside, trials = np.zeros(2), 80
    for seed in range(trials):
        forecast = fit_benchmark(_models(noise=0.01, seed=seed), chance=0.25, resamples=200).forecast(1e24)
        pairs = (forecast.nll, _nll(1e24)), (forecast.accuracy, _accuracy(_nll(1e24)))
        inside += [estimate.low <= truth <= estimate.high for estimate, truth in pairs]
    assert (inside >= 67).all() and (inside < trials).any(), inside


def test_forecasts_are_seeded() -> None:
    first, again, other = (fit_benchmark(_models(noise=0.02), seed=seed).forecast(1e24) for seed in (3, 3, 4))
    assert first == again != other


def test_ceiling_and_chance_bound_the_forecast() -> None:
    models = [Model(m.flops, m.nll, 0.1 + 0.8 * ((m.accuracy or 0) - 0.25) / 0.75) for m in _models()]
    benchmark = fit_benchmark(models, chance=0.1, ceiling=0.9)
    assert (benchmark.steepness, benchmark.middle) == pytest.approx((20, 1.32), rel=1e-7)
    assert benchmark.accuracy(-50.0) == pytest.approx(0.9) and benchmark.accuracy(50.0) == pytest.approx(0.1)


def test_what_no_curve_goes_through_is_refused() -> None:
    models = _models()
    with pytest.raises(UsageError, match=r"too few different budgets among the models with flops.*got 2"):
        fit_benchmark(models[4:])
    with pytest.raises(UsageError, match=r"too few different NLLs among the models with accuracy.*got 0"):
        fit_benchmark([Model(m.flops, m.nll, None) for m in models])
    with pytest.raises(UsageError, match="does not fall with compute"):
        fit_benchmark([Model(m.flops, 3 - m.nll, m.accuracy) for m in models])
    with pytest.raises(UsageError, match="does not rise as the NLL falls"):
        fit_benchmark([Model(m.flops, m.nll, 1 - (m.accuracy or 0)) for m in models])
    with pytest.raises(UsageError, match=r"no model is better than chance; got 0\.\d+; allowed: above 0.9"):
        fit_benchmark(models, chance=0.9)
    with pytest.raises(UsageError, match="are no range"):
        fit_benchmark(models, chance=0.5, ceiling=0.5)


def test_a_step_has_no_steepness() -> None:
    step = [Model(m.flops, m.nll, float(m.nll < 1.35)) for m in _models()]
    with pytest.raises(UsageError, match="steepness"):
        fit_benchmark(step)


def test_tables_leave_out_what_a_model_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,flops,nll,accuracy\nours,1e20,1.4,\ntheirs,,1.3,0.5\n")
    (tmp_path / "a.jsonl").write_text('{"flops": 1e20, "nll": 1.4}\n{"flops": null, "nll": 1.3, "accuracy": 0.5}\n')
    expected = [Model(1e20, 1.4, None), Model(None, 1.3, 0.5)]
    assert read_models(tmp_path / "a.csv") == read_models(tmp_path / "a.jsonl") == expected
    (tmp_path / "b.csv").write_text("nll,accuracy\n1.4,52\n")
    with pytest.raises(FileFormatError, match="line 2, accuracy: is not valid; got 52; allowed: a number from 0 to 1"):
        read_models(tmp_path / "b.csv")
