"""Scaling laws: small runs at fixed compute tell how large a model, how many tokens and what loss a budget buys, and
which mix of sources is best.

    >>> fit = fit_ladder(read_runs("ladder.jsonl"))
    >>> fit.predict(3.8e25).tokens.value
    >>> fit_mixes(read_mixes("mixes.jsonl"), 1e20).best().weights

Source of the methods: The Llama 3 Herd of Models, sections 3.2.1 and 3.1.2. Nothing here needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.pretrain.scaling.forecast import Benchmark, Model, fit_benchmark, read_models
    from herd.pretrain.scaling.isoflop import LadderFit, Run, fit_ladder, read_runs
    from herd.pretrain.scaling.ladder import LadderConfig, Rung, plan
    from herd.pretrain.scaling.laws import LossLaw, PowerLaw
    from herd.pretrain.scaling.mixes import MixRun, read_mixes
    from herd.pretrain.scaling.mixfit import MixFit, epoch_bounds, fit_mixes
    from herd.pretrain.scaling.mixlaw import MixLaw
    from herd.pretrain.scaling.mixplan import spread_mixes
    from herd.pretrain.scaling.mixplot import plot_mixes
    from herd.pretrain.scaling.plot import plot_ladder

__getattr__ = lazy_names(
    __name__,
    {
        "forecast": ("Benchmark", "Model", "fit_benchmark", "read_models"),
        "isoflop": ("LadderFit", "Run", "fit_ladder", "read_runs"),
        "ladder": ("LadderConfig", "Rung", "plan"),
        "laws": ("LossLaw", "PowerLaw"),
        "mixes": ("MixRun", "read_mixes"),
        "mixfit": ("MixFit", "epoch_bounds", "fit_mixes"),
        "mixlaw": ("MixLaw",),
        "mixplan": ("spread_mixes",),
        "mixplot": ("plot_mixes",),
        "plot": ("plot_ladder",),
    },
)

__all__ = [
    "Benchmark",
    "LadderConfig",
    "LadderFit",
    "LossLaw",
    "MixFit",
    "MixLaw",
    "MixRun",
    "Model",
    "PowerLaw",
    "Run",
    "Rung",
    "epoch_bounds",
    "fit_benchmark",
    "fit_ladder",
    "fit_mixes",
    "plan",
    "plot_ladder",
    "plot_mixes",
    "read_mixes",
    "read_models",
    "read_runs",
    "spread_mixes",
]
