"""Mixing laws: synthetic ones, brute force over numbers and the simplex, curves over budgets, bounds, wrong use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from herd.errors import UsageError
from herd.pretrain.scaling import MixFit, MixRun, epoch_bounds, fit_mixes, spread_mixes
from herd.pretrain.scaling.mixlaw import mix_laws
from herd.pretrain.scaling.simplex import lowest

Array = npt.NDArray[np.float64]
NAMES = ("code", "prose", "maths", "talk")
FLOORS = np.array([1.2, 2.0, 1.5, 1.8])
LOGS = np.array([[-0.9, 0.8, 0.3, 0.6], [0.7, -0.5, 0.5, 0.1], [0.2, 0.6, -1.2, 0.9], [0.5, 0.0, 0.8, -0.7]])
"""u of domain d and source j, so that L_d = FLOORS_d + exp(Σ LOGS_dj · r_j)."""


def _truth(shares: Array, flops: float = 1e18) -> Array:
    """The losses [D]; the part above the floor falls as C^-0.1, so that the law has this form at every C."""
    sources = len(shares)
    height = np.exp(LOGS[:sources, :sources] @ shares) * (flops / 1e18) ** -0.1
    return np.asarray(FLOORS[:sources] + height)


def _runs(
    shares: Array, budgets: Sequence[float] = (1e18,), noise: float = 0.0, rng: np.random.Generator | None = None
) -> list[MixRun]:
    names, runs = NAMES[: shares.shape[1]], []
    for flops, mix in itertools.product(budgets, shares):
        losses = _truth(mix, flops) + (0 if rng is None else noise * rng.normal(size=len(names)))
        runs.append(MixRun(flops, dict(zip(names, mix, strict=True)), dict(zip(names, losses, strict=True))))
    return runs


def _mixes(sources: int, count: int, seed: int = 0) -> Array:
    drawn = np.random.default_rng(seed).dirichlet(np.ones(sources), count)
    return np.asarray(0.05 + (1 - 0.05 * sources) * drawn)


def _named(shares: Sequence[float]) -> dict[str, float]:
    return dict(zip(NAMES, shares, strict=False))


@pytest.mark.parametrize(("sources", "count"), [(2, 3), (2, 6), (3, 8), (4, 9)])
def test_laws_without_noise_are_recovered(sources: int, count: int) -> None:
    fit = fit_mixes(_runs(_mixes(sources, count)))
    for d, law in enumerate(fit.laws.values()):
        assert law.floor == pytest.approx(FLOORS[d], abs=1e-6)
        assert sum(law.slopes.values()) == pytest.approx(0, abs=1e-12)
        assert np.log(law.factor) + np.array(list(law.slopes.values())) == pytest.approx(LOGS[d, :sources], abs=1e-6)
    for mix in _mixes(sources, 5, seed=9):
        predicted = fit.predict(_named(mix))
        assert [loss.value for loss in predicted.values()] == pytest.approx(_truth(mix), abs=1e-7)
    assert fit.extrapolation == 1 and len(fit.used) == count
    assert [mix.fitted for mix in fit.mixes] == [pytest.approx(mix.losses) for mix in fit.mixes]


def test_the_fit_is_the_best_that_brute_force_finds() -> None:
    shares, rng = _mixes(2, 7), np.random.default_rng(4)
    for noise in (0.003, 0.03, 0.2):
        loss = np.array([_truth(mix)[0] for mix in shares]) + noise * rng.normal(size=7)

        def squares(floor: Array, u0: Array, u1: Array, loss: Array = loss) -> Array:
            law = floor[..., None] + np.exp(u0[..., None] * shares[:, 0] + u1[..., None] * shares[:, 1])
            return np.asarray(((loss - law) ** 2).sum(axis=-1))

        floor, u = mix_laws(shares, loss[None])
        ours = float(squares(floor[0], u[0, 0], u[0, 1]))
        best = np.inf
        for fixed in np.linspace(0, loss.min() + 0.05, 60):  # at each floor, zoom in on the two others
            low, high = np.array([-6.0, -6.0]), np.array([3.0, 3.0])
            for _ in range(14):
                axes = np.linspace(low, high, 25)
                found = squares(np.full((25, 25), fixed), *np.meshgrid(axes[:, 0], axes[:, 1], indexing="ij"))
                at = np.unravel_index(found.argmin(), found.shape)
                centre, reach = np.array([axes[at[0], 0], axes[at[1], 1]]), (high - low) / 5
                low, high = centre - reach, centre + reach
            best = min(best, float(found.min()))
        assert ours <= best * (1 + 1e-9)
        assert ours >= best * 0.9  # brute force comes near, so the two mean the same


def test_a_law_that_is_all_but_straight_keeps_its_floor_at_zero() -> None:
    shares = _mixes(2, 6)
    straight = 3 - 0.5 * shares[:, 0] + 0.02 * shares[:, 0] * shares[:, 1]  # bends the other way than an exponential
    floor, u = mix_laws(shares, straight[None])
    assert floor[0] == 0
    assert np.exp(shares @ u[0]) == pytest.approx(straight, abs=0.02)


@pytest.mark.parametrize(("sources", "count"), [(2, 6), (3, 10)])
def test_intervals_hold_what_they_promise(sources: int, count: int) -> None:
    inside, trials, rng = np.zeros(2), 40, np.random.default_rng(1)
    mix = _mixes(sources, 1, seed=77)[0]
    best = lowest(LOGS[None, :sources, :sources], np.ones(sources) / sources, np.zeros(sources), np.ones(sources))[0]
    for _ in range(trials):
        fit = fit_mixes(_runs(_mixes(sources, count), noise=0.01, rng=rng), resamples=100)
        predicted, found = fit.predict(_named(mix))["code"], fit.best()
        share = found.weights["code"]
        inside += [predicted.low <= _truth(mix)[0] <= predicted.high, share.low <= best[0] <= share.high]
    assert (inside >= 0.82 * trials).all(), inside  # 95 % are promised
    assert (inside < trials).any(), inside


def test_intervals_are_seeded_and_grow_with_noise() -> None:
    def width(noise: float, seed: int = 0) -> float:
        runs = _runs(_mixes(3, 9), noise=noise, rng=np.random.default_rng(2))
        loss = fit_mixes(runs, seed=seed, resamples=200).predict({"code": 0.5, "prose": 0.5})["code"]
        return loss.high - loss.low

    assert width(0.004) == width(0.004) != width(0.004, seed=1)
    assert 2.5 < width(0.004) / width(0.001) < 6


def _lattice(sources: int, steps: int, low: Array, high: Array) -> Array:
    points = [p for p in itertools.product(range(steps + 1), repeat=sources - 1) if sum(p) <= steps]
    shares = np.array([(*p, steps - sum(p)) for p in points]) / steps
    return np.asarray(shares[((shares >= low - 1e-12) & (shares <= high + 1e-12)).all(axis=1)])


@pytest.mark.parametrize(
    ("sources", "low", "high"),
    [(2, 0.0, 1.0), (3, 0.0, 1.0), (4, 0.0, 1.0), (3, 0.2, 0.5), (4, 0.1, 0.35)],
)
def test_the_best_mix_is_that_of_brute_force(sources: int, low: float, high: float) -> None:
    rng = np.random.default_rng(sources)
    u = rng.normal(0, 1.5, (40, 3, sources))
    weights, lows, highs = rng.dirichlet(np.ones(3)), np.full(sources, low), np.full(sources, high)
    highs[0] = 1.0
    found = lowest(u, weights, lows, highs)
    assert found.sum(axis=1) == pytest.approx(1, abs=1e-9)
    assert (found >= lows - 1e-9).all() and (found <= highs + 1e-9).all()
    points = _lattice(sources, 40, lows, highs)
    at_points = (weights * np.exp(u @ points.T).transpose(0, 2, 1)).sum(axis=-1)
    ours = (weights * np.exp((u @ found[:, :, None])[:, :, 0])).sum(axis=1)
    assert (ours <= at_points.min(axis=1) + 1e-8 * at_points.max(axis=1)).all()
    nearest = points[at_points.argmin(axis=1)]
    assert (ours > 0.9 * at_points.min(axis=1)).all() and np.abs(found - nearest).mean() < 0.03


def test_bounds_that_leave_one_mix_or_a_fixed_share() -> None:
    u, even = LOGS[None, :3, :3], np.ones(3) / 3
    assert lowest(u, even, np.array([0.2, 0.3, 0.5]), np.ones(3))[0] == pytest.approx([0.2, 0.3, 0.5])
    fixed = lowest(u, even, np.array([0.25, 0.0, 0.0]), np.array([0.25, 1.0, 1.0]))[0]
    points = _lattice(3, 400, np.array([0.25, 0, 0]), np.array([0.25, 1, 1]))
    assert fixed == pytest.approx(points[np.exp(points @ u[0].T).sum(axis=1).argmin()], abs=0.003)


def _fit(**more: int) -> MixFit:
    return fit_mixes(_runs(_mixes(3, 9), noise=0.002, rng=np.random.default_rng(0)), resamples=100, **more)


def test_weights_of_domains_move_the_best_mix() -> None:
    fit = _fit()
    even, code = fit.best(), fit.best({"code": 8, "prose": 1, "maths": 1})
    assert code.weights["code"].value > even.weights["code"].value + 0.1
    assert code.losses["code"].value < even.losses["code"].value
    assert code.domains == pytest.approx({"code": 0.8, "prose": 0.1, "maths": 0.1})
    assert code.mean.value == pytest.approx(sum(code.domains[d] * code.losses[d].value for d in code.domains))
    assert even.mean.low < even.mean.value < even.mean.high
    alone = fit.best({"code": 1})
    assert alone.weights["code"].value == pytest.approx(1, abs=1e-6)  # nothing else lowers it
    assert alone.losses["code"].value == pytest.approx(fit.predict({"code": 1})["code"].value, abs=1e-6)


def test_sources_are_repeated_no_more_than_told() -> None:
    fit = _fit()
    most = epoch_bounds({"code": 1e9, "maths": 90e9}, tokens=20e9, epochs=4)
    assert most == {"code": pytest.approx(0.2), "maths": 1.0}
    best = fit.best({"code": 1}, most=most, least={"prose": 0.3})
    assert best.weights["code"].value == pytest.approx(0.2, abs=1e-6)
    assert best.weights["prose"].value >= 0.3 - 1e-9 and best.weights["code"].high <= 0.2 + 1e-9


def test_several_budgets_are_taken_to_the_wanted_one() -> None:
    shares, target = _mixes(3, 6), 3e20
    fit = fit_mixes(_runs(shares, (1e18, 4e18, 1.6e19, 6e19)), target)
    assert fit.extrapolation == pytest.approx(5) and all(mix.runs == mix.budgets == 4 for mix in fit.mixes)
    for mix, found in zip(shares, fit.mixes, strict=True):
        assert list(found.losses.values()) == pytest.approx(_truth(mix, target), rel=1e-5)
    elsewhere = _mixes(3, 1, seed=5)[0]
    losses = fit.predict(_named(elsewhere))
    assert [loss.value for loss in losses.values()] == pytest.approx(_truth(elsewhere, target), rel=1e-4)
    assert fit_mixes(_runs(shares, (1e18, 1e19))).flops == 1e19  # the largest


def test_two_budgets_give_a_power_law_without_a_floor() -> None:
    fit = fit_mixes(_runs(_mixes(2, 4), (1e18, 1e19)), 1e20)
    for mix, found in zip(_mixes(2, 4), fit.mixes, strict=True):
        by_hand = _truth(mix, 1e19) ** 2 / _truth(mix, 1e18)  # a straight line in logs
        assert list(found.losses.values()) == pytest.approx(by_hand, rel=1e-4)


def test_mixes_that_do_not_count_are_said() -> None:
    runs = _runs(_mixes(2, 5), (1e18, 1e19))
    runs.append(MixRun(1e18, {"code": 0.5, "prose": 0.5}, {"code": 2.0, "prose": 3.0}))
    runs += [MixRun(c, {"code": 0.4, "prose": 0.6}, {"code": c / 1e18, "prose": 3.0}) for c in (1e18, 1e19)]
    fit = fit_mixes(runs, 1e19)
    unused = [mix.unused for mix in fit.mixes if mix.unused]
    assert unused == ["trained at 1e+18 FLOPs alone", "its loss of code does not fall with compute"]
    assert fit.laws == fit_mixes(runs[:10], 1e19).laws


def test_the_same_mix_twice_tells_the_noise() -> None:
    """As many mixes as a law has numbers are met exactly, and no interval can be given; a repeated run gives one."""
    runs = _runs(_mixes(2, 3))
    exact = fit_mixes(runs)
    assert np.isnan(exact.predict({"code": 1})["code"].high) and np.isnan(exact.best().weights["code"].low)
    assert np.isnan(exact.noise["code"]) and exact.to_dict()["resamples"] == 0
    again = MixRun(runs[0].flops, runs[0].weights, {name: loss + 0.02 for name, loss in runs[0].losses.items()})
    fit = fit_mixes([*runs, again])
    assert fit.noise["code"] == pytest.approx(0.02 / np.sqrt(2), rel=1e-3)  # two runs 0.02 apart, one degree of freedom
    assert np.isfinite(fit.predict({"code": 1})["code"].high)


def test_wrong_tables_of_runs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"too few different mixes .* law of 4 numbers.*got 3; allowed: 4, and 6"):
        fit_mixes(_runs(_mixes(3, 3)) * 2)
    with pytest.raises(UsageError, match=r"too few.*not used: code=.* trained at 1e\+18 FLOPs alone"):
        fit_mixes(_runs(_mixes(2, 5)), 1e19)
    together = np.array([[0.2 + x, 0.2 + x, 0.6 - 2 * x] for x in (0, 0.05, 0.1, 0.15, 0.2, 0.25)])
    with pytest.raises(UsageError, match="do not tell the sources apart"):
        fit_mixes(_runs(together))
    with pytest.raises(UsageError, match="two sources or more"):
        fit_mixes([MixRun(1e18, {"code": 1.0}, {"code": 2.0})] * 4)
    with pytest.raises(UsageError, match="all have the same sources and domains"):
        fit_mixes([*_runs(_mixes(2, 4)), MixRun(1e18, {"code": 1.0}, {"code": 2.0})])
    with pytest.raises(UsageError, match="all have the same"):
        fit_mixes([])
    for arguments in ({"resamples": 9}, {"confidence": 1.0}, {"flops": 0.0}):
        with pytest.raises(UsageError, match=r"not valid|no budget"):
            fit_mixes(_runs(_mixes(2, 4)), **arguments)  # type: ignore[arg-type]


def test_wrong_questions_are_refused() -> None:
    fit = _fit()
    with pytest.raises(UsageError, match=r"no such source; got cod; did you mean 'code'\?"):
        fit.predict({"cod": 1})
    with pytest.raises(UsageError, match=r"do not sum to 1; got code=0.5, prose=0.2, maths=0"):
        fit.predict({"code": 0.5, "prose": 0.2})
    with pytest.raises(UsageError, match="no such domain"):
        fit.best({"poems": 1})
    with pytest.raises(UsageError, match="from 0 on, one of them above 0"):
        fit.best({"code": 0})
    for bounds in ({"most": {"code": 0.2, "prose": 0.3, "maths": 0.4}}, {"least": {"code": 0.6, "prose": 0.5}},
                   {"least": {"code": 0.5}, "most": {"code": 0.4}}):  # fmt: skip
        with pytest.raises(UsageError, match="no mix keeps these bounds"):
            fit.best(**bounds)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0"):
        epoch_bounds({"code": 1e9}, 0, 4)


@pytest.mark.parametrize("sources", [2, 3, 5])
def test_planned_mixes_are_far_apart_and_sum_to_one(sources: int) -> None:
    names = [f"s{j}" for j in range(sources)]
    own = {name: 1 / sources for name in names}
    mixes = spread_mixes(names, 9, begin=[own], seed=3)
    shares = np.array([list(mix.values()) for mix in mixes])
    assert shares.sum(axis=1) == pytest.approx(1, abs=1e-9) and (shares[1:] >= 0.0495).all()
    assert list(mixes[0].values()) == pytest.approx(list(own.values()), abs=2e-3)
    assert mixes == spread_mixes(names, 9, begin=[own], seed=3) != spread_mixes(names, 9, begin=[own], seed=4)

    def nearest(points: Array) -> float:
        return float(min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)))

    at_random = [nearest(0.05 + (1 - 0.05 * sources) * _dirichlet(sources, seed)) for seed in range(50)]
    assert nearest(shares) > max(at_random)
    with pytest.raises(UsageError, match="no room to mix"):
        spread_mixes(names, 9, least=1 / sources)
    with pytest.raises(UsageError, match="two sources or more"):
        spread_mixes(["code"], 3)


def _dirichlet(sources: int, seed: int) -> Array:
    return np.asarray(np.random.default_rng(seed).dirichlet(np.ones(sources), 9))
