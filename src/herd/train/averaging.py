"""Averages of the weights along the path: often better than the last weights, at the cost of one copy.

"ema": exponential moving average, the weight of old steps fading. "tail": the plain mean over the last share of the
steps (Polyak; Llama 3 averages checkpoints of its annealing phase, arXiv 2407.21783 §3.4.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from herd.train.callbacks import Callback, StepRecord
from herd.train.config import TrainConfig

if TYPE_CHECKING:
    from herd.train.trainer import Trainer, TrainResult


class WeightAverage(Callback):
    """Keeps the average in fp32 beside the model and puts it in place of the weights when the run finishes.

    The state written at the end holds the weights of the last step, so that a run can be continued from it.
    """

    name = "average"

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._average: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        total = trainer.total_steps
        if self._config.average == "tail" and record.step <= total - max(1, round(self._config.tail * total)):
            self._average, self._count = {}, 0  # the end may have moved away again
            return
        weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        if not self._average:
            self._average = {name: p.detach().float().clone() for name, p in weights.items()}
            self._count = 1
            return
        self._count += 1
        share = 1 / self._count
        if self._config.average == "ema":
            # The first steps average plainly, so that the initial weights do not linger.
            share = max(1 - self._config.ema_decay, share)
        torch._foreach_lerp_(list(self._average.values()), [weights[name].float() for name in self._average], share)

    @torch.no_grad()
    def on_finish(self, trainer: Trainer[Any], result: TrainResult) -> None:
        parameters = dict(trainer.model.named_parameters())
        for name, average in self._average.items():
            parameters[name].copy_(average)

    def state(self) -> dict[str, Any]:
        return {"average": self._average, "count": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        self._average, self._count = dict(state["average"]), state["count"]
