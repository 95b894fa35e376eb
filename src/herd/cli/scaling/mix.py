"""`herd scaling mix`: the mix of sources whose predicted loss is lowest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.options import takes_groups
from herd.cli.output import emit, table
from herd.cli.scaling import Bootstrap, between, check_writable, named_numbers, no_floor
from herd.errors import UsageError

if TYPE_CHECKING:
    from herd.pretrain.scaling.laws import Estimate
    from herd.pretrain.scaling.mixfit import BestMix, MixFit

    _Losses = Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the shares of a mix may be."""

    least: Annotated[str, typer.Option(metavar="SOURCE=SHARE,…", help="Smallest shares.")] = ""
    most: Annotated[str, typer.Option(metavar="SOURCE=SHARE,…", help="Largest shares.")] = ""
    have: Annotated[
        str, typer.Option(metavar="SOURCE=TOKENS,…", help="Tokens that there are, for --tokens and --epochs.")
    ] = ""
    tokens: Annotated[float | None, typer.Option(help="Tokens of the large run.")] = None
    epochs: Annotated[float, typer.Option(help="Times that it may read what there is, with --have.")] = 4.0

    def shares(self, sources: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """`least` and `most` for `MixFit.best`."""
        from herd.pretrain.scaling import epoch_bounds

        least = named_numbers("--least", self.least, sources) if self.least else {}
        most = named_numbers("--most", self.most, sources) if self.most else {}
        if bool(self.have) != (self.tokens is not None):
            raise UsageError("--have and --tokens are given together", fix="--have code=2e9 --tokens 1e10 --epochs 4")
        if self.tokens is not None:
            own = epoch_bounds(named_numbers("--have", self.have, sources), self.tokens, self.epochs)
            most |= {name: min(share, most.get(name, 1.0)) for name, share in own.items()}
        return {"least": least, "most": most}


@takes_groups
def command(
    runs: Annotated[
        Path, typer.Argument(help="A table (*.jsonl, *.csv) with the columns flops, weight.SOURCE…, loss.DOMAIN….")
    ],
    *,
    flops: Annotated[
        float | None, typer.Option(help="Training FLOPs to predict for.  [default: the table's largest]")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="DOMAIN=WEIGHT,…", help="Of the domains' losses.  [default: all the same]")
    ] = "",
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE=SHARE,…", help="Predict this mix as well; may be repeated."),
    ] = None,
    bounds: Bounds,
    bootstrap: Bootstrap,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the fit and the best mix.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the fit and its predictions as JSON.")] = False,
) -> None:
    """Find the mix of sources whose predicted loss is lowest, from small runs on several mixes.

    Each domain's held-out loss is c + k · exp(Σ t · share), a law with a number for each source and one more. With
    several budgets each mix's loss is first taken to --flops by its own curve E + B · C^-β. The best mix has the lowest
    mean loss over the domains. All runs of a budget have the same model, steps and held-out text.

    Examples:

        herd scaling mix runs/mine-mixes/mixes.jsonl

        herd scaling mix mixes.csv --flops 1e20 --weights code=2,prose=1 --mix code=0.5,prose=0.5

        herd scaling mix mixes.csv --have code=2e9,prose=8e9 --tokens 2e10 --epochs 4 --plot mix.png --json
    """
    from herd.pretrain.scaling import fit_mixes, plot_mixes, read_mixes

    check_writable("--plot", plot)
    fit = fit_mixes(read_mixes(runs), flops, **bootstrap.arguments())
    domains = named_numbers("--weights", weights, fit.laws) if weights else None
    given = [named_numbers("--mix", text, fit.sources) for text in mix or []]
    best = fit.best(domains, **bounds.shares(fit.sources))
    predictions = [(shares, fit.predict(shares)) for shares in given]
    if plot is not None:
        plot_mixes(fit, best, plot)
    plain = [{"mix": shares, "losses": _plain(losses)} for shares, losses in predictions]
    data = fit.to_dict() | {"best": dataclasses.asdict(best), "predictions": plain}
    emit(data, as_json, lambda: print(_text(fit, best, predictions, plot)))


def _plain(losses: _Losses) -> dict[str, Any]:
    return {name: dataclasses.asdict(estimate) for name, estimate in losses.items()}


def _text(
    fit: MixFit, best: BestMix, predictions: Sequence[tuple[Mapping[str, float], _Losses]], plot: Path | None
) -> str:
    from herd.pretrain.scaling.isoflop import FLOOR_BUDGETS, SAME_BUDGET

    slopes = [f"t {name}" for name in fit.sources]
    laws = [
        [name, f"{law.floor:.4g}", f"{law.factor:.4g}", *(f"{t:+.3f}" for t in law.slopes.values()), _noise(fit, name)]
        for name, law in fit.laws.items()
    ]
    parts = [table(["domain", "c", "k", *slopes, "noise"], laws)]
    unused = [[_said(mix.weights), mix.runs, mix.unused] for mix in fit.mixes if mix.unused]
    if unused:
        parts.append(table(["mix", "runs", "not used"], unused))
    parts.append(table(["source", "best share"], [[name, between(share)] for name, share in best.weights.items()]))
    mixes = [["best", *(between(loss, 4) for loss in best.losses.values()), between(best.mean, 4)]]
    for shares, losses in predictions:
        mean = sum(best.domains[name] * loss.value for name, loss in losses.items())
        mixes.append([_said(shares), *(between(loss, 4) for loss in losses.values()), f"{mean:.4g}"])
    parts.append(table(["mix", *(f"loss of {name}" for name in fit.laws), "weighted mean"], mixes))
    said = f"{fit.confidence:.0%} intervals from {len(fit.logs):,} resamples, seed {fit.seed}"
    if not len(fit.logs):
        said = "no intervals: there are as many mixes as a law has numbers; train more"
    reach = f"{len(fit.used)} mixes at {fit.flops:.3g} FLOPs, {fit.extrapolation:.3g}× the largest budget"
    if fit.extrapolation > SAME_BUDGET and min(mix.budgets for mix in fit.used) < FLOOR_BUDGETS:
        said += f"\n{no_floor()}"
    return "\n\n".join([*parts, f"{reach}\n{said}"]) + (f"\npicture: {plot}" if plot else "")


def _noise(fit: MixFit, domain: str) -> str:
    return f"{fit.noise[domain]:.2g}" if len(fit.logs) else ""


def _said(weights: Mapping[str, float]) -> str:
    return " ".join(f"{name}={share:.3g}" for name, share in weights.items())
