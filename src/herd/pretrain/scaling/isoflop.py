"""IsoFLOP analysis: runs of several sizes at fixed budgets, and the law of the compute-optimal model behind them.

At each budget C the loss is a parabola in log tokens; its minimum is the compute-optimal run. Over the budgets the
minima follow tokens N*(C) = A·C^α, a straight line in logs (The Llama 3 Herd of Models, section 3.2.1, eq. 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herd.errors import UsageError
from herd.pretrain.scaling.laws import Array, Estimate, LossLaw, PowerLaw, lines, loss_curves, noise_scale
from herd.pretrain.scaling.table import Column, read_table

SAME_BUDGET = 1.1
"""Runs whose FLOPs differ by less than this factor have the same budget: steps are whole, so none is met exactly."""
FLOOR_BUDGETS = 3
"""Budgets from which the loss is fitted with a floor: two points do not tell three numbers."""
RESAMPLES = 1000

_COLUMNS = (
    Column("flops", 1.0, 1e40),
    Column("params", 1.0, 1e20),
    Column("tokens", 1.0, 1e20),
    Column("loss", 1e-6, 1e3),
)


@dataclass(frozen=True)
class Run:
    """One trained model: training FLOPs, all parameters, training tokens, final loss (held out) in nats per token."""

    flops: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Budget:
    """The runs of one budget in order of tokens, and the minimum of their parabola.

    `flops` is the runs' geometric mean. `parabola` has the coefficients of loss = a·x² + b·x + c with x = ln tokens.
    `unused` says why the budget has no minimum that counts; tokens, params and loss are NaN then.
    """

    flops: float
    runs: tuple[Run, ...]
    parabola: tuple[float, float, float] | None
    tokens: float
    params: float
    loss: float
    unused: str | None


@dataclass(frozen=True)
class Prediction:
    """The compute-optimal run of a budget. `extrapolation`: the budget as a multiple of the ladder's largest;
    `has_floor`: of the law of the loss."""

    flops: float
    extrapolation: float
    tokens: Estimate
    params: Estimate
    loss: Estimate
    has_floor: bool


@dataclass(frozen=True)
class LadderFit:
    """Laws of the compute-optimal tokens, parameters and loss, each over C in FLOPs.

    `replicates` has for each law its numbers under every bootstrap resample, with factors as logarithms; it is empty
    where every parabola goes through its runs exactly, and no interval can be given.
    """

    budgets: tuple[Budget, ...]
    tokens: PowerLaw
    params: PowerLaw
    loss: LossLaw
    replicates: Mapping[str, tuple[Array, ...]]
    confidence: float
    seed: int

    @property
    def used(self) -> list[Budget]:
        """The budgets whose minimum counts."""
        return [budget for budget in self.budgets if budget.unused is None]

    def exponent(self, law: str) -> Estimate:
        """The exponent of the law of `tokens`, `params` or `loss`."""
        return Estimate.of(getattr(self, law).exponent, self.replicates[law][-1], self.confidence)

    def factor(self, law: str) -> Estimate:
        """The factor before C^exponent. Its interval is wide, for it belongs to one FLOP, far from every budget."""
        return Estimate.of(getattr(self, law).factor, np.exp(self.replicates[law][-2]), self.confidence)

    @property
    def has_floor(self) -> bool:
        """Whether there are budgets enough for one; else it is taken for 0, and losses far beyond are too low."""
        return len(self.used) >= FLOOR_BUDGETS

    def floor(self) -> Estimate:
        """The loss that no compute goes below, without an interval where it is not fitted."""
        found = self.replicates["loss"][0] if self.has_floor else np.zeros(0)
        return Estimate.of(self.loss.floor, found, self.confidence)

    def predict(self, flops: float) -> Prediction:
        """Optimal tokens, parameters and loss for a budget in FLOPs. Raises UsageError for one that is no number > 0.

        The intervals are those of the laws: a single run's loss scatters around the law by its own noise.
        """
        check_flops(flops)
        x = np.log(flops)

        def sized(law: str) -> Estimate:
            log_factor, exponent = self.replicates[law]
            return Estimate.of(getattr(self, law)(flops), np.exp(log_factor + exponent * x), self.confidence)

        floor, log_factor, exponent = self.replicates["loss"]
        losses = floor + np.exp(log_factor - exponent * x)
        return Prediction(
            flops=flops,
            extrapolation=flops / max(budget.flops for budget in self.used),
            tokens=sized("tokens"),
            params=sized("params"),
            loss=Estimate.of(self.loss(flops), losses, self.confidence),
            has_floor=self.has_floor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the budgets with their minima, the laws with their intervals."""
        laws = {
            name: {"factor": asdict(self.factor(name)), "exponent": asdict(self.exponent(name))}
            for name in ("tokens", "params", "loss")
        }
        laws["loss"]["floor"] = asdict(self.floor())
        return {
            "laws": laws,
            "budgets": [asdict(budget) for budget in self.budgets],
            "confidence": self.confidence,
            "resamples": len(self.replicates["tokens"][0]),
            "usable_resamples": int(np.isfinite(self.replicates["tokens"][1]).sum()),
            "seed": self.seed,
        }


def check_flops(flops: float) -> None:
    """Raises UsageError for a budget that is no number of FLOPs."""
    if not 1.0 <= flops <= 1e40:
        raise UsageError("this is no budget", value=flops, allowed="FLOPs from 1 to 1e40, as 3.8e25")


def read_runs(path: str | Path) -> list[Run]:
    """The runs of a table with the columns flops, params, tokens, loss. Raises FileFormatError with line and field."""
    rows: Any = read_table(path, _COLUMNS)
    return [Run(**row) for row in rows]


def fit_ladder(
    runs: Sequence[Run], *, resamples: int = RESAMPLES, confidence: float = 0.95, seed: int = 0
) -> LadderFit:
    """Fit the parabolas and the laws over their minima, with bootstrap intervals.

    A budget counts when it has three sizes or more and its parabola has a minimum between them. Raises UsageError with
    fewer than two such budgets.

    Bootstrap: every run's loss is drawn again, as its parabola's value plus the residual of a random run of any budget
    (scaled by √(n / (n - 3)) for the n runs of its own, and by `noise_scale`), and everything is fitted anew. Runs are
    not drawn with replacement: of a budget's four, one draw in three would leave fewer sizes than a parabola needs.
    """
    check_bootstrap(resamples, confidence)
    budgets = [_budget(group) for group in _grouped(runs)]
    used = [budget for budget in budgets if budget.unused is None]
    if len(used) < 2:
        raise UsageError(
            "the ladder has too few budgets with a minimum: " + "; ".join(_say(budget) for budget in budgets),
            value=len(used),
            allowed="two or more",
            fix="train more sizes, some smaller and some larger than the best",
        )
    x = np.array([np.log(budget.flops) for budget in used])
    point = _laws(x, *(np.array([[getattr(b, name) for b in used]]) for name in ("tokens", "params", "loss")))
    if not np.isfinite(point["loss"][2][0]):
        raise UsageError(
            "the lowest loss does not fall from budget to budget",
            value=", ".join(f"{budget.loss:.4g}" for budget in used),
            fix="train larger budgets longer, and compare runs on the same held-out text",
        )
    return LadderFit(
        tuple(budgets),
        tokens=_power_law(point["tokens"]),
        params=_power_law(point["params"]),
        loss=LossLaw(float(point["loss"][0][0]), float(np.exp(point["loss"][1][0])), float(point["loss"][2][0])),
        replicates=_bootstrap(x, used, resamples, np.random.default_rng(seed)),
        confidence=confidence,
        seed=seed,
    )


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Raises UsageError for numbers that make no interval."""
    if not 100 <= resamples <= 10_000:
        raise UsageError("the number of resamples is not valid", value=resamples, allowed="100 to 10000")
    if not 0.5 <= confidence <= 0.999:
        raise UsageError("the confidence is not valid", value=confidence, allowed="0.5 to 0.999")


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each budget, from the smallest budget on; within one in order of tokens."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops < groups[-1][0].flops * SAME_BUDGET:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [sorted(group, key=lambda run: run.tokens) for group in groups]


def _budget(runs: Sequence[Run]) -> Budget:
    flops = float(np.exp(np.mean([np.log(run.flops) for run in runs])))
    none = (float("nan"),) * 3
    if len({run.tokens for run in runs}) < 3:
        return Budget(flops, tuple(runs), None, *none, unused="fewer than three sizes")
    minima = _Minima(runs)
    a, b, c = (float(value) for value in minima.coefficients(minima.losses[None, :])[0])
    tokens, params, loss = (float(values[0]) for values in minima.of(minima.losses[None, :]))
    m, s = minima.mean, minima.spread  # from the scaled variable back to x = ln tokens
    parabola = (a / s**2, b / s - 2 * a * m / s**2, a * m**2 / s**2 - b * m / s + c)
    unused = None if np.isfinite(tokens) else "no minimum" if a <= 0 else "the minimum lies beyond the sizes"
    return Budget(flops, tuple(runs), parabola, tokens, params, loss, unused)


class _Minima:
    """Parabolas through the runs of one budget, for many sets of losses [R, n] at once.

    The variable is ln tokens with mean 0 and spread 1, so that the fit is well conditioned.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        x = np.log([run.tokens for run in runs])
        self.losses: Array = np.array([run.loss for run in runs])
        self.mean, self.spread = float(x.mean()), float(x.std())
        self._z = (x - self.mean) / self.spread
        self._log_params = np.log([run.params for run in runs])
        self._powers = np.vander(self._z, 3)
        self._solve = np.linalg.pinv(self._powers).T

    def coefficients(self, losses: Array) -> Array:
        """a, b, c [R, 3] of a·z² + b·z + c."""
        return np.asarray(losses @ self._solve)

    def of(self, losses: Array) -> tuple[Array, Array, Array]:
        """Tokens, parameters and loss [R] at the minimum; NaN where none lies between the sizes.

        Parameters are read off between the two sizes beside it: at a fixed budget they follow from the tokens.
        """
        a, b, c = self.coefficients(losses).T
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(a > 0, -b / (2 * a), np.nan)
            z = np.where((z >= self._z[0]) & (z <= self._z[-1]), z, np.nan)
        params = np.exp(np.interp(z, self._z, self._log_params))
        return np.exp(self.mean + self.spread * z), params, c + z * (b + a * z)

    def fitted(self) -> Array:
        """The parabola's value at every run [n]."""
        return np.asarray(self._powers @ self.coefficients(self.losses[None, :])[0])

    def residuals(self) -> Array:
        """Residuals with the variance of the runs' own noise; none for three runs, which are met exactly."""
        n = len(self.losses)
        return (self.losses - self.fitted()) * np.sqrt(n / (n - 3)) if n > 3 else np.zeros(0)


def _bootstrap(
    x: Array, used: Sequence[Budget], resamples: int, rng: np.random.Generator
) -> dict[str, tuple[Array, ...]]:
    parts = [_Minima(budget.runs) for budget in used]
    pool = np.concatenate([part.residuals() for part in parts])
    if not pool.size:
        nothing = np.zeros(0)
        return {"tokens": (nothing,) * 2, "params": (nothing,) * 2, "loss": (nothing,) * 3}
    freedom = len(pool) - 3 * sum(len(part.losses) > 3 for part in parts)
    scale = noise_scale(freedom, resamples, rng)
    pool = pool - pool.mean()
    found = [part.of(part.fitted() + scale * rng.choice(pool, (resamples, len(part.losses)))) for part in parts]
    return _laws(x, *(np.stack([minimum[i] for minimum in found], axis=1) for i in range(3)))


def _laws(x: Array, tokens: Array, params: Array, loss: Array) -> dict[str, tuple[Array, ...]]:
    """The numbers of the three laws over minima [R, B]."""
    return {
        "tokens": lines(x, np.log(tokens)),
        "params": lines(x, np.log(params)),
        "loss": loss_curves(x, loss, floor=len(x) >= FLOOR_BUDGETS),
    }


def _power_law(numbers: tuple[Array, ...]) -> PowerLaw:
    return PowerLaw(float(np.exp(numbers[0][0])), float(numbers[1][0]))


def _say(budget: Budget) -> str:
    return f"{budget.flops:.3g} FLOPs: {budget.unused or 'has one'}"
