"""Scaling laws: small runs at fixed compute tell how large a model, how many tokens and what loss a budget buys.

    >>> fit = fit_ladder(read_runs("ladder.jsonl"))
    >>> fit.predict(3.8e25).tokens.value

Source of the method: The Llama 3 Herd of Models, section 3.2.1. Nothing here needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.pretrain.scaling.forecast import Benchmark, Model, fit_benchmark, read_models
    from herd.pretrain.scaling.isoflop import LadderFit, Run, fit_ladder, read_runs
    from herd.pretrain.scaling.ladder import LadderConfig, Rung, plan
    from herd.pretrain.scaling.laws import LossLaw, PowerLaw
    from herd.pretrain.scaling.plot import plot_ladder

__getattr__ = lazy_names(
    __name__,
    {
        "forecast": ("Benchmark", "Model", "fit_benchmark", "read_models"),
        "isoflop": ("LadderFit", "Run", "fit_ladder", "read_runs"),
        "ladder": ("LadderConfig", "Rung", "plan"),
        "laws": ("LossLaw", "PowerLaw"),
        "plot": ("plot_ladder",),
    },
)

__all__ = [
    "Benchmark",
    "LadderConfig",
    "LadderFit",
    "LossLaw",
    "Model",
    "PowerLaw",
    "Run",
    "Rung",
    "fit_benchmark",
    "fit_ladder",
    "plan",
    "plot_ladder",
    "read_models",
    "read_runs",
]
