"""Which mix to train on: mixing laws fitted to small runs on several mixes, and the mix whose predicted loss is lowest.

The Llama 3 Herd of Models, section 3.1.2: small models are trained on a mix, the loss of a large one on it is
predicted, and so mixes are compared. Where the table has several budgets, each mix's loss is first taken to the wanted
FLOPs by its own curve E + B·C^-β, and the laws are fitted to that (Ye et al., Data Mixing Laws, arXiv 2403.16952).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from herd.errors import UsageError, near
from herd.pretrain.scaling.isoflop import RESAMPLES, check_bootstrap, check_flops
from herd.pretrain.scaling.laws import Array, Estimate, noise_scale
from herd.pretrain.scaling.mixcurves import Mix, mixes_at
from herd.pretrain.scaling.mixes import MixRun, checked_mix
from herd.pretrain.scaling.mixlaw import MixLaw, mix_laws
from herd.pretrain.scaling.simplex import lowest

_FLATTEST = 1e-3
"""Where the mixes reach so little further in one direction than in another, nothing tells what it does."""


@dataclass(frozen=True)
class BestMix:
    """The mix with the lowest mean of the domains' losses, weighted by `domains`.

    `weights`: its shares. `losses`, `mean`: of this mix. The intervals of the shares say where the best mix may be,
    those of the losses how well this one's are known.
    """

    domains: Mapping[str, float]
    weights: Mapping[str, Estimate]
    losses: Mapping[str, Estimate]
    mean: Estimate


@dataclass(frozen=True)
class MixFit:
    """A mixing law for each domain, at `flops`. `extrapolation`: as a multiple of the table's largest budget.

    `noise`: what a run's loss differs from the law by, as a standard deviation in nats. `floors` [R, D] and `logs`
    [R, D, M] have the laws' c and u = ln k + t under every bootstrap resample; they are empty where the mixes are just
    as many as a law has numbers, and no interval can be given.
    """

    flops: float
    extrapolation: float
    sources: tuple[str, ...]
    mixes: tuple[Mix, ...]
    laws: Mapping[str, MixLaw]
    noise: Mapping[str, float]
    floors: Array
    logs: Array
    confidence: float
    seed: int

    @property
    def used(self) -> list[Mix]:
        """The mixes that count."""
        return [mix for mix in self.mixes if mix.unused is None]

    def predict(self, mix: Mapping[str, float]) -> dict[str, Estimate]:
        """The loss of each domain after training on a mix; a source that is not named has no share.

        The intervals are those of the laws: a single run scatters around them by `noise`. Raises UsageError.
        """
        self._check_names(mix, self.sources, "source")
        weights = checked_mix(dict.fromkeys(self.sources, 0.0) | dict(mix))
        drawn = self._drawn(np.array([weights[name] for name in self.sources]))
        return {
            name: Estimate.of(law(weights), drawn[:, i], self.confidence)
            for i, (name, law) in enumerate(self.laws.items())
        }

    def best(
        self,
        domains: Mapping[str, float] | None = None,
        *,
        least: Mapping[str, float] | None = None,
        most: Mapping[str, float] | None = None,
    ) -> BestMix:
        """The mix whose mean loss over the domains is lowest. `domains`: their weights, relative to each other; None:
        all the same. `least` and `most`: bounds of a source's share. Raises UsageError for bounds that no mix keeps.
        """
        weights = dict.fromkeys(self.laws, 1.0) if domains is None else dict(domains)
        self._check_names(weights, self.laws, "domain")
        total = sum(weights.values())
        if not (total > 0 and min(weights.values()) >= 0):
            raise UsageError("domains are weighed by numbers from 0 on, one of them above 0", value=weights)
        weight = np.array([weights.get(name, 0.0) / total for name in self.laws])
        low, high = self._bounds(least or {}, most or {})
        point = np.array([[[_log(law, name) for name in self.sources] for law in self.laws.values()]])
        shares = lowest(point, weight, low, high)[0]
        losses = self.predict(dict(zip(self.sources, shares.tolist(), strict=True)))
        places = lowest(self.logs, weight, low, high) if len(self.logs) else np.zeros((0, len(shares)))
        mean = sum(weight[i] * estimate.value for i, estimate in enumerate(losses.values()))
        return BestMix(
            domains={name: float(value) for name, value in zip(self.laws, weight, strict=True)},
            weights={
                name: Estimate.of(float(shares[j]), places[:, j], self.confidence)
                for j, name in enumerate(self.sources)
            },
            losses=losses,
            mean=Estimate.of(float(mean), self._drawn(shares) @ weight, self.confidence),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the laws, the mixes with what the laws say of them."""
        return {
            "flops": self.flops,
            "extrapolation": self.extrapolation,
            "sources": list(self.sources),
            "laws": {name: asdict(law) | {"noise": self.noise[name]} for name, law in self.laws.items()},
            "mixes": [asdict(mix) for mix in self.mixes],
            "confidence": self.confidence,
            "resamples": len(self.logs),
            "seed": self.seed,
        }

    def _drawn(self, shares: Array) -> Array:
        """The losses [R, D] of a mix under every resample."""
        return np.asarray(self.floors + np.exp(self.logs @ shares))

    def _bounds(self, least: Mapping[str, float], most: Mapping[str, float]) -> tuple[Array, Array]:
        for bounds in (least, most):
            self._check_names(bounds, self.sources, "source")
        low, high = (
            np.array([given.get(name, end) for name in self.sources]) for given, end in ((least, 0.0), (most, 1.0))
        )
        high = np.minimum(high, 1.0)
        if (low < 0).any() or (low > high).any() or low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            said = ", ".join(f"{name} {a:g} to {b:g}" for name, a, b in zip(self.sources, low, high, strict=True))
            raise UsageError("no mix keeps these bounds", value=said, allowed="bounds between which shares sum to 1")
        return low, high

    @staticmethod
    def _check_names(given: Mapping[str, float], known: Sequence[str] | Mapping[str, Any], what: str) -> None:
        for name in given:
            if name not in known:
                raise UsageError(f"the table has no such {what}", value=name, allowed=near(name, known))


def epoch_bounds(have: Mapping[str, float], tokens: float, epochs: float) -> dict[str, float]:
    """The largest share of each source in `tokens` tokens that repeats none of its own, `have`, more than so often."""
    if not (tokens > 0 and epochs > 0):
        raise UsageError("tokens and epochs must be above 0", value=(tokens, epochs))
    return {name: min(1.0, epochs * own / tokens) for name, own in have.items()}


def fit_mixes(
    runs: Sequence[MixRun],
    flops: float | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> MixFit:
    """Fit every domain's mixing law at `flops` (None: the table's largest budget), with bootstrap intervals.

    Runs of one mix at two budgets or more give its loss there by E + B·C^-β, with E = 0 for two budgets; a mix that was
    trained at one budget counts at that budget alone. Raises UsageError where fewer mixes count than a law has numbers,
    one a source and the floor, or where they all lie in one direction.

    Bootstrap: every mix's losses are drawn again, as the laws' values plus the residuals of a random mix, those of all
    domains together, scaled by √(n / (n - P)) for the P numbers of a law and by `noise_scale`; all laws are fitted
    anew. What the curves over compute add to the noise is in these residuals.
    """
    check_bootstrap(resamples, confidence)
    if not runs or any((set(r.weights), set(r.losses)) != (set(runs[0].weights), set(runs[0].losses)) for r in runs):
        raise UsageError("a law needs runs that all have the same sources and domains", value=f"{len(runs)} runs")
    largest = max(run.flops for run in runs)
    flops = largest if flops is None else flops
    check_flops(flops)
    sources, domains = tuple(runs[0].weights), tuple(runs[0].losses)
    found = mixes_at(runs, flops)
    used = [mix for mix in found if mix.unused is None]
    shares = np.array([[mix.weights[name] for name in sources] for mix in used]).reshape(-1, len(sources))
    _check_mixes(shares, found, flops, sources)
    losses = np.array([[mix.losses[name] for name in domains] for mix in used])
    parts = [mix_laws(shares, column[None]) for column in losses.T]
    fitted = np.stack([floor[0] + np.exp(shares @ u[0]) for floor, u in parts], axis=1)
    freedom = len(used) - len(sources) - 1
    rest = losses - fitted
    noise = np.sqrt((rest**2).sum(axis=0) / freedom) if freedom else np.full(len(domains), np.nan)
    floors, logs = _bootstrap(shares, fitted, rest, resamples if freedom else 0, np.random.default_rng(seed))
    rows = iter(fitted)
    return MixFit(
        flops=flops,
        extrapolation=flops / largest,
        sources=sources,
        mixes=tuple(mix if mix.unused else replace(mix, fitted=_named(domains, next(rows))) for mix in found),
        laws={name: _law(sources, *part) for name, part in zip(domains, parts, strict=True)},
        noise=_named(domains, noise),
        floors=floors,
        logs=logs,
        confidence=confidence,
        seed=seed,
    )


def _check_mixes(shares_nM: Array, found: Sequence[Mix], flops: float, sources: Sequence[str]) -> None:
    if len(sources) < 2:
        raise UsageError("a mix needs two sources or more", value=", ".join(sources))
    different, needed = len(np.unique(shares_nM.round(4), axis=0)), len(sources) + 1
    if different < needed:
        unused = "; ".join(f"{_say(mix.weights)}: {mix.unused}" for mix in found if mix.unused)
        raise UsageError(
            f"too few different mixes at {flops:.3g} FLOPs for a law of {needed} numbers, a slope for each of"
            f" {len(sources)} sources and the floor" + (f" (not used: {unused})" if unused else ""),
            value=different,
            allowed=f"{needed}, and {needed + 2} or more for intervals that say something",
            fix="herd scaling mix-run RECIPE, with more --mixes or more budgets",
        )
    reach = np.linalg.svd(shares_nM, compute_uv=False)
    if reach[-1] < _FLATTEST * reach[0]:
        raise UsageError(
            "the mixes do not tell the sources apart: some shares always change together",
            value="; ".join(_say(mix.weights) for mix in found if mix.unused is None),
            fix="add mixes that change them apart from each other",
        )


def _bootstrap(
    shares: Array, fitted_nD: Array, rest_nD: Array, resamples: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    n, numbers = len(shares), shares.shape[1] + 1
    if not resamples:
        return np.zeros((0, fitted_nD.shape[1])), np.zeros((0, fitted_nD.shape[1], shares.shape[1]))
    pool = (rest_nD - rest_nD.mean(axis=0)) * np.sqrt(n / (n - numbers))
    scale = noise_scale(n - numbers, resamples, rng)
    drawn = fitted_nD + scale[:, :, None] * pool[rng.integers(n, size=(resamples, n))]
    drawn = np.maximum(drawn, 1e-6)  # no loss is below 0, however much a wild resample would have it
    floors, logs = zip(*(mix_laws(shares, drawn[:, :, d]) for d in range(drawn.shape[2])), strict=True)
    return np.stack(floors, axis=1), np.stack(logs, axis=1)


def _law(sources: Sequence[str], floor: Array, u: Array) -> MixLaw:
    mean = float(u[0].mean())
    return MixLaw(float(floor[0]), float(np.exp(mean)), _named(sources, u[0] - mean))


def _log(law: MixLaw, source: str) -> float:
    return float(np.log(law.factor) + law.slopes[source])


def _named(names: Sequence[str], values: Array) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _say(weights: Mapping[str, float]) -> str:
    return " ".join(f"{name}={share:.3g}" for name, share in weights.items())
