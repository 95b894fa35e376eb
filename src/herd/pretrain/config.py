"""What a pretraining stage can be told, besides the model's shape. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from herd.config import Config
from herd.train.config import TrainConfig


class PretrainConfig(Config):
    """Data, time and evaluation of a pretraining stage; `train` has the knobs of the loop."""

    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of the initial weights, the order of the data and the loop"
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents end to end, cut where a row ends; best_fit: cut only if longer than a row",
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time for the whole stage: steps are lowered to what this machine can do in it",
    )
    evaluations: int = Field(
        default=8, ge=0, description="times the held-out probe is scored along the way, at equal distances"
    )
    probe_tokens: int = Field(default=32_768, ge=1, description="about so many held-out tokens are in the probe")
    save_dtype: Literal["f32", "bf16"] = Field(default="f32", description="number format of the saved checkpoint")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training loop")
