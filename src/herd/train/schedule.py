"""Learning rates as a pure function of the step, so that a schedule has no state to save."""

from __future__ import annotations

import math

from herd.train.config import TrainConfig


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0) of `total` as a share of the peak.

    Warm-up over w steps: (step + 1) / w. Then from 1 to r = final_lr_ratio at the last step, with t in [0, 1]:
    cosine r + (1 - r)·(1 + cos πt)/2 (Llama 1 to 3), linear 1 - (1 - r)·t, wsd 1 until the last share `decay` of the
    steps and then linear (Hu et al. 2024, arXiv 2404.06395). With `anneal`, all this ends so many steps
    earlier, and the rest falls linearly from where it ended to 0 at the last step (arXiv 2407.21783 §3.4.3). With
    `schedule_steps` it is that of a run of so many steps, of which this one does the first.
    """
    before = max(total - config.anneal, 0)
    length = config.schedule_steps or before
    if config.anneal and step >= before:
        start = _scheduled(before - 1, length, config) if before else 1.0
        return start * (1 - min(1.0, (step - before + 1) / (total - before)))
    return _scheduled(step, length, config)


def _scheduled(step: int, total: int, config: TrainConfig) -> float:
    """The schedule without annealing."""
    warmup, last, final = warmup_steps(total, config), total - 1, config.final_lr_ratio
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        start = max(warmup, total - max(1, round(config.decay * total)))
        if step < start:
            return 1.0
    # `start - 1` is the last step at the peak, so that the first decaying step is already below it.
    t = min(1.0, (step - start + 1) / max(1, last - start + 1))
    if config.schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2
    return 1 - (1 - final) * t


def warmup_steps(total: int, config: TrainConfig) -> int:
    """Steps of the linear warm-up of a run of `total` steps."""
    return round(config.warmup * total) if config.warmup < 1 else round(config.warmup)
