"""Runs on mixes of sources, as a table. A mix is a share of the training tokens for every source; shares sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError, UsageError
from herd.pretrain.scaling.table import Column, column_names, read_numbered

WEIGHT, LOSS = "weight.", "loss."
"""What the columns of a source's share and of a domain's held-out loss begin with."""
SUM_TOLERANCE = 5e-3
"""Shares may miss the sum of 1 by this much, as rounded ones do; they are made to meet it."""


@dataclass(frozen=True)
class MixRun:
    """One trained model: training FLOPs, each source's share of the tokens, each domain's held-out loss in nats per
    token. Domains are what the loss is measured on; they often are the sources, and need not be.
    """

    flops: float
    weights: Mapping[str, float]
    losses: Mapping[str, float]


def read_mixes(path: str | Path) -> list[MixRun]:
    """The runs of a table with the columns flops, weight.SOURCE and loss.DOMAIN, one of each kind or more.

    Raises FileFormatError with line and field, also for shares that do not sum to 1.
    """
    names = column_names(path)
    sources, domains = ([name.removeprefix(kind) for name in names if name.startswith(kind)] for kind in (WEIGHT, LOSS))
    for kind, found, example in ((WEIGHT, sources, "code"), (LOSS, domains, "prose")):
        if not all(found) or not found:
            raise FileFormatError(f"has no column {kind}NAME", file=path, allowed=f"as {kind}{example}")
    columns = [Column("flops", 1.0, 1e40)]
    columns += [Column(WEIGHT + name, 0.0, 1.0) for name in sources]
    columns += [Column(LOSS + name, 1e-6, 1e3) for name in domains]
    runs = []
    for line, row in read_numbered(path, columns):
        values: Any = row
        weights = {name: values[WEIGHT + name] for name in sources}
        try:
            weights = checked_mix(weights)
        except UsageError as error:
            raise FileFormatError(
                error.what, file=path, field=f"line {line}", value=error.value, allowed=error.allowed
            ) from None
        runs.append(MixRun(values["flops"], weights, {name: values[LOSS + name] for name in domains}))
    return runs


def checked_mix(weights: Mapping[str, float]) -> dict[str, float]:
    """The shares, which now sum to exactly 1 but for rounding. Raises UsageError where they are far from it."""
    total = sum(weights.values())
    if not abs(total - 1) <= SUM_TOLERANCE or min(weights.values()) < 0:
        said = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise UsageError("the weights of the sources do not sum to 1", value=said, allowed="shares from 0 to 1")
    return {name: weight / total for name, weight in weights.items()}
