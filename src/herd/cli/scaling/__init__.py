"""What the verbs of `herd scaling` have in common: lists of FLOPs, the options of the bootstrap, intervals as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.errors import UsageError, near

if TYPE_CHECKING:
    from herd.pretrain.scaling import LadderConfig
    from herd.pretrain.scaling.laws import Estimate

Recipe = Annotated[str, typer.Argument(help="The recipe to train with, or the name of one in recipes/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="STAGE.FIELD=VALUE", help="Changed values, as YAML.")]
Budgets = Annotated[str, typer.Option(metavar="C,C,…", help="Training FLOPs of the rungs, two or more.")]


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95
    resamples: Annotated[int, typer.Option(help="Times that the fit is repeated on redrawn losses.")] = 1000
    seed: Annotated[int, typer.Option(min=0, help="Of the redrawing.")] = 0

    def arguments(self) -> dict[str, Any]:
        """The same for the functions that fit."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes at each budget of a ladder."""

    sizes: Annotated[int, typer.Option(help="Models at each budget.")] = 4
    ratio: Annotated[float, typer.Option(help="Tokens per weight where the best size is expected.")] = 20.0
    spread: Annotated[
        float, typer.Option(help="Sizes reach from this many times fewer weights than there to so many more.")
    ] = 3.0

    def config(self, budgets: str) -> LadderConfig:
        """The same with the text of --budgets as a LadderConfig."""
        from herd.config import parse_config
        from herd.pretrain.scaling import LadderConfig

        values = dataclasses.asdict(self) | {"budgets": flops_list("--budgets", budgets)}
        return parse_config(LadderConfig, values, "herd scaling")


def flops_list(option: str, text: str) -> list[float]:
    """The numbers of a list such as "1e15,3e15"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(1.0 <= value <= 1e40 for value in values):
        raise UsageError(f"{option} is no list of FLOPs", value=text, allowed="numbers from 1 to 1e40, as 1e15,3e15")
    return values


def named_numbers(option: str, text: str, known: Iterable[str]) -> dict[str, float]:
    """The numbers of a list such as "code=0.7,prose=0.3", whose names are among the known ones, each once."""
    names, found = list(known), dict[str, float]()
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in names:
            raise UsageError(f"{option} names what is not there", value=name, allowed=near(name, names))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf or name in found:
            raise UsageError(f"{option} is no list NAME=NUMBER,…", value=text, allowed=f"as {names[0]}=0.5")
        found[name] = number
    return found


def check_writable(option: str, path: Path | None) -> None:
    """Raises UsageError, before any work, for a file that could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{option} cannot be written there", value=path, allowed="a file in a folder that exists")


def no_floor() -> str:
    """What is to be said of losses where there are too few budgets for a floor."""
    from herd.pretrain.scaling.isoflop import FLOOR_BUDGETS

    few = FLOOR_BUDGETS - 1
    return f"with {few} budgets a curve has no floor and may be too low beyond them: train a third budget"


def between(estimate: Estimate, digits: int = 3) -> str:
    """`1.65e+13 (1.59e+13 to 1.71e+13)`; without the interval where there is none."""
    if not math.isfinite(estimate.low):
        return f"{estimate.value:.{digits}g}"
    return f"{estimate.value:.{digits}g} ({estimate.low:.{digits}g} to {estimate.high:.{digits}g})"


def counted(estimate: Estimate) -> str:
    """`16.5T (15.9T to 17.1T)`."""
    from herd.recipe.units import count

    if not math.isfinite(estimate.low):
        return count(estimate.value)
    return f"{count(estimate.value)} ({count(estimate.low)} to {count(estimate.high)})"
