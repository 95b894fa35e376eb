"""The stages that take a short-context Llama to a long one, by the pattern of Gradient's Llama 3 8B with 4M tokens.

Its card extends 8,192 tokens to 4,194,304 in five stages, each from the last, with a larger RoPE base and few tokens.
A plan for another model keeps the card's steps relative to the trained context: x8, x32, x64, x128, x512.
Source: model card of gradientai/Llama-3-8B-Instruct-Gradient-4194k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, model_validator

from herd.architecture import LlamaConfig, RopeScaling, StretchMethod, law_theta, stretched
from herd.errors import UsageError
from herd.pretrain.config import Criteria
from herd.train.parallel.config import ParallelConfig

PlanMethod = Literal["card", StretchMethod]


@dataclass(frozen=True)
class CardStage:
    """One column of the card's table. `batch` sequences a forward pass over all GPUs, `accumulation` of them a step."""

    name: str
    context: int
    theta: float
    batch: int
    accumulation: int
    steps: int
    tokens: int
    lr: float
    gpus: int
    minutes: int


CARD_CONTEXT, CARD_THETA = 8192, 500_000.0  # of Llama 3 8B Instruct, where the card begins
CARD = (
    CardStage("65K", 1 << 16, 15.3e6, 1, 32, 30, 62_914_560, 2e-5, 8, 202),
    CardStage("262K", 1 << 18, 207.1e6, 1, 16, 24, 100_663_296, 2e-5, 32, 555),
    CardStage("524K", 1 << 19, 1.06e9, 16, 1, 50, 419_430_400, 2e-5, 512, 61),
    CardStage("1048K", 1 << 20, 2.80e9, 16, 1, 50, 838_860_800, 2e-5, 512, 87),
    CardStage("4194K", 1 << 22, 45.2e9, 2, 2, 11, 184_549_376, 2e-5, 512, 433),
)
"""As published; GPUs are L40S."""


@dataclass(frozen=True)
class ExtensionStage:
    """One stage of a plan: continue from the last one at `context` tokens with this theta and scaling.

    card: the card's stage whose batch, steps and learning rate are taken. law_theta: what the theta law says here.
    """

    context: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    law_theta: float
    batch: int
    accumulation: int
    steps: int
    tokens: int
    lr: float
    card: str


class ExtendConfig(Criteria):
    """How the planned stages are trained and judged. What is null is as in the plan."""

    method: PlanMethod = Field(default="law", description="how RoPE is stretched")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the order of the data")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps of each stage")
    batch_size: int | None = Field(default=None, ge=1, description="rows of a step")
    micro_batch: int | None = Field(
        default=None, ge=1, description="rows of a forward pass on a rank; null: as many as hold 4,096 tokens"
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how several ranks (torchrun) share the model and the rows"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for the matrices inside the blocks, AdamW for everything else"
    )
    lr: float | None = Field(default=None, gt=0, le=1, description="peak learning rate")
    muon_lr: float | None = Field(default=None, gt=0, le=1, description="peak learning rate of Muon; null: as lr")
    warmup: float = Field(default=0.1, ge=0, description="linear warm-up; below 1: a share of the steps")
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="learning rate after the warm-up; linear: down to 0"
    )
    related: bool = Field(default=True, description="join related documents to ones as long as the context")
    chats: float = Field(
        default=0.0, ge=0, le=1, description="share of the documents made into long chats that ask for what was said"
    )
    probe_tokens: int = Field(default=65_536, ge=1, description="about so many held-out tokens judge short text")
    save_dtype: Literal["f32", "bf16"] = Field(default="f32", description="number format of the checkpoints")

    @model_validator(mode="after")
    def _fits(self) -> ExtendConfig:
        if self.optimizer == "muon" and self.parallel.needs_mesh:
            raise ValueError("optimizer muon works on whole matrices, and parallel splits them: use adamw")
        return self


def plan_extension(config: LlamaConfig, to: int, method: PlanMethod = "law") -> list[ExtensionStage]:
    """The stages from the model's context to `to` tokens; the last takes what the card does at or above its length.

    method: how RoPE is stretched, see `stretched`; "card" takes the published bases, and so only goes from Llama 3's
    8,192 tokens and theta 5e5 to lengths of the card.
    Raises UsageError for what cannot be stretched, and beyond 512 times the context, where the card ends.
    """
    methods = ("card", *get_args(StretchMethod))
    if method not in methods:
        raise UsageError("unknown way to stretch RoPE", value=method, allowed=", ".join(methods))
    trained = config.context_length
    ratios = [stage.context // CARD_CONTEXT for stage in CARD]
    if to > trained * ratios[-1]:
        raise UsageError("the card's pattern ends before", value=to, allowed=f"up to {trained * ratios[-1]} tokens")
    contexts = [trained * ratio for ratio in ratios if trained * ratio < to] + [to]
    return [_stage(config, context, CARD[i], method) for i, context in enumerate(contexts)]


def _stage(config: LlamaConfig, context: int, card: CardStage, method: PlanMethod) -> ExtensionStage:
    card_theta = _card_theta(config, context) if method == "card" else None
    longer = stretched(config, context, "law" if method == "card" else method)
    return ExtensionStage(
        context=context,
        rope_theta=card_theta or longer.rope_theta,
        rope_scaling=longer.rope_scaling,
        law_theta=law_theta(config.rope_theta, config.context_length, context),
        batch=card.batch,
        accumulation=card.accumulation,
        steps=card.steps,
        tokens=card.batch * card.accumulation * card.steps * context,
        lr=card.lr,
        card=card.name,
    )


def _card_theta(config: LlamaConfig, context: int) -> float:
    if (config.context_length, config.rope_theta) != (CARD_CONTEXT, CARD_THETA):
        raise UsageError(
            "the card's bases are for Llama 3's own",
            value=f"context {config.context_length}, theta {config.rope_theta:g}",
            allowed=f"context {CARD_CONTEXT}, theta {CARD_THETA:g}",
            fix="--method law",
        )
    published = {stage.context: stage.theta for stage in CARD}
    if context not in published:
        raise UsageError("the card has no base for this length", value=context, allowed=", ".join(map(str, published)))
    return published[context]
