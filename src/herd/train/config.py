"""Every knob of the training loop, with its meaning and bounds. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from herd.config import Config
from herd.errors import UsageError
from herd.train.parallel.config import ParallelConfig

MICRO_BATCH_TOKENS = 4096
"""Tokens of a micro-batch when the config leaves its size open: larger ones were not faster on any CPU measured."""


class TrainConfig(Config):
    """One run of the loop. The defaults are the Llama recipe: AdamW 0.9/0.95, weight decay 0.1, clipping at 1."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps in all")
    seq_len: int = Field(default=512, ge=1, description="tokens of a row")
    batch_size: int = Field(default=16, ge=1, description="rows of an optimiser step, over all micro-batches and ranks")
    micro_batch: int | None = Field(
        default=None, ge=1, description=f"rows of one forward pass; null: as many as hold {MICRO_BATCH_TOKENS} tokens"
    )

    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for the matrices inside the blocks, AdamW for everything else"
    )
    lr: float = Field(default=3e-4, gt=0, le=1, description="peak learning rate of AdamW")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW: decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, le=1, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="decoupled decay of matrices; vectors have none")
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm, 0: no clipping")
    muon_lr: float | None = Field(
        default=None, gt=0, le=1, description="peak learning rate of Muon, whose updates have AdamW's size; null: as lr"
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon: Nesterov momentum")

    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="after the warm-up; wsd: constant, then linear decay over the last share `decay`"
    )
    warmup: float = Field(
        default=0.02, ge=0, description="linear warm-up; below 1: a share of all steps, else so many steps"
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="wsd: share of all steps that decay")
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="learning rate at the last step / peak")
    schedule_steps: int | None = Field(
        default=None, ge=1, description="steps that the schedule is made for, where the run ends earlier; null: its own"
    )
    anneal: int = Field(
        default=0, ge=0, description="last steps, in which the rate falls linearly to 0; the schedule ends before them"
    )

    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of matrix products; weights stay fp32. auto: bf16 where the hardware multiplies it faster",
    )
    float8: bool = Field(
        default=False, description="products inside the blocks in float8, but for the first and last one; needs torchao"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="torch.compile of each block; auto: when the run is long enough to win the time back",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to train; auto: a GPU if there is one"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of everything random inside a step; a stage puts its own seed here"
    )

    checkpoint_every: int = Field(
        default=0, ge=0, description="steps between checkpoints of the state, 0: by time alone"
    )
    checkpoint_seconds: float = Field(default=60.0, ge=0, description="seconds between checkpoints, 0: by steps alone")
    checkpoint_background: bool = Field(
        default=False, description="write checkpoints beside the training, from a copy of the state in memory"
    )
    keep: int = Field(default=2, ge=1, description="checkpoints of the state that are kept")
    log_every: int = Field(default=10, ge=1, description="steps between lines in metrics.jsonl")

    spike_factor: float = Field(
        default=10.0, ge=0, description="skip a step whose gradient norm exceeds this many recent medians, 0: never"
    )
    max_skips: int = Field(
        default=5, ge=1, description="skipped steps in a row before the run goes back to a checkpoint"
    )
    max_rollbacks: int = Field(default=3, ge=0, description="times the run may go back before it gives up")

    average: Literal["none", "ema", "tail"] = Field(
        default="none", description="weights at the end: ema: exponential average; tail: mean over the last steps"
    )
    ema_decay: float = Field(default=0.999, gt=0, lt=1, description="decay of the exponential average per step")
    tail: float = Field(default=0.1, gt=0, le=1, description="share of all steps whose weights are averaged")

    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how several ranks (torchrun) share the model and the batch"
    )

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch_size {self.batch_size}")
        if self.optimizer == "muon" and self.parallel.needs_mesh:
            raise ValueError("optimizer muon works on whole matrices, and parallel splits them: use adamw")
        if self.float8 and self.parallel.tp > 1:
            raise ValueError("float8 is not for matrices that are split (parallel.tp)")
        if self.compile == "on" and max(self.parallel.tp, self.parallel.cp) > 1:
            raise ValueError("compile is not for blocks that exchange with other ranks (parallel.tp, parallel.cp)")
        if self.anneal > self.steps:
            raise ValueError(f"anneal {self.anneal} is more than all steps, {self.steps}")
        return self

    def check_context(self, context_length: int) -> None:
        """Raises UsageError where rows are longer than a model's context."""
        if self.seq_len > context_length:
            raise UsageError(
                "rows are longer than the model's context",
                value=self.seq_len,
                allowed=f"seq_len up to {context_length}",
                fix="lower train.seq_len or raise the model's context_length",
            )

    @property
    def batch_tokens(self) -> int:
        """Tokens of an optimiser step, padding included."""
        return self.batch_size * self.seq_len

    @property
    def micro_batch_rows(self) -> int:
        """Rows of one forward pass, also where the config leaves it open."""
        return self.micro_batch or max(1, min(self.batch_size, MICRO_BATCH_TOKENS // self.seq_len))


FREE_TO_CHANGE = frozenset(
    {
        "checkpoint_every",
        "checkpoint_seconds",
        "checkpoint_background",
        "keep",
        "log_every",
        "max_rollbacks",
        "parallel",
    }
)
"""Fields that a resumed run may have otherwise: the others would change its result."""
