"""What a run cost: floating-point operations, energy and carbon, each with its formula.

FLOPs per token: `herd.architecture.training_flops_per_token`, 6·N for the weights and 6·L·H·K·S for causal attention;
the output matrix, V·D of the N, counts for supervised tokens only.
Carbon as in Meta's model cards: tCO2 = hours × W × PUE × kgCO2/kWh / 10⁶.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.architecture import LlamaConfig, multiplying_parameter_count, training_flops_per_token

PFLOP_DAY = 1e15 * 86_400
"""Floating-point operations in one petaFLOP/s-day."""


@dataclass(frozen=True)
class TrainingCompute:
    """FLOPs of one training stage: `tokens` tokens through a model with `weights` multiplying weights, N."""

    tokens: int
    weights: int
    weight_flops: float
    attention_flops: float

    @property
    def flops(self) -> float:
        return self.weight_flops + self.attention_flops

    @property
    def pflop_days(self) -> float:
        return self.flops / PFLOP_DAY


def training_compute(config: LlamaConfig, tokens: int, supervised: int, seq_len: int) -> TrainingCompute:
    """FLOPs of training on `tokens` tokens, of which `supervised` are predicted, in rows of `seq_len`.

    An upper bound where documents are shorter than a row.
    """
    total = training_flops_per_token(config, seq_len, supervised / tokens) * tokens
    attention = (training_flops_per_token(config, seq_len) - training_flops_per_token(config, 0)) * tokens
    return TrainingCompute(tokens, multiplying_parameter_count(config), total - attention, attention)


@dataclass(frozen=True)
class Energy:
    """Energy and carbon of `hours` core-hours (or GPU-hours) at `watts` each."""

    hours: float
    watts: float
    pue: float
    kg_per_kwh: float

    @property
    def kwh(self) -> float:
        """Energy with the data centre's overhead, in kWh."""
        return self.hours * self.watts * self.pue / 1000

    @property
    def tonnes_co2(self) -> float:
        """tCO2 = h × W × PUE × kg/kWh / 10⁶."""
        return self.hours * self.watts * self.pue * self.kg_per_kwh / 1e6
