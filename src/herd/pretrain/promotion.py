"""When training goes on to the next length: both of the Llama 3 paper's criteria (arXiv 2407.21783 §3.4.2).

Short texts are read as well as before the extension: bits per byte of held-out text in windows of the context that the
model first had, at most `tolerance` of them more than the first model's. And numbers hidden in texts of the new length
are found: how many, the caller measures. `herd.pretrain.extending` asks between stages, with an engine;
`herd.pretrain.promoting` between the phases of one run, on the ranks that train.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from herd import model as models
from herd.corpus import EvaluationWindows, TokenShards
from herd.pretrain.config import Criteria
from herd.train.batches import Batch
from herd.train.losses import next_token_loss

_WINDOW_TOKENS = 4096


@dataclass(frozen=True)
class Criterion:
    """One measured thing and what it must be: at most or at least `wanted`."""

    name: str
    value: float
    wanted: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether it is as it must be."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def describe(self) -> str:
        """As in "needles found 0.8, at least 1 wanted"."""
        return f"{self.name} {self.value:.6g}, {'at most' if self.at_most else 'at least'} {self.wanted:.6g} wanted"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for extension.json and promotion.json."""
        return asdict(self) | {"met": self.met}


def criteria(asked: Criteria, short_before: float, short: float, needles: float | None) -> list[Criterion]:
    """What is asked: of bits per byte of short text, before and now, and of the share of needles found, where it is
    known."""
    found = []
    if asked.tolerance is not None or not math.isfinite(short):  # which no model may be
        allowed = short_before * (1 + asked.tolerance) if asked.tolerance is not None else math.inf
        found.append(Criterion("bits per byte of short text", short, allowed, at_most=True))
    if asked.needles and needles is not None:
        found.append(Criterion("needles found", needles, asked.needles, at_most=False))
    return found


def short_bits_per_byte(checkpoint: Path, heldout: TokenShards, context: int) -> float:
    """Bits per byte of held-out documents in windows of `context` tokens, half of which overlap; in fp32."""
    windows = EvaluationWindows(heldout, context, max(1, _WINDOW_TOKENS // context))
    model = models.load(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        nats = sum(next_token_loss(model, Batch.from_arrays(window.batch))[0].item() for window in windows)
    return windows.bits_per_byte(nats)
