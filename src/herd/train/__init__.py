"""The one training loop: every stage is this `Trainer` with another batch source and another pure loss function.

    >>> source = PackedSource(PackedDataset(shards, seq_len=512, batch_size=16, seed=0), micro_batch=8)
    >>> Trainer(model, next_token_loss, source, TrainConfig(steps=1000), "runs/mine").fit()

Run again after any interruption, a `kill -9` included, it continues to the same final weights, bit by bit. Names load
when they are first used: `TrainConfig` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.train.averaging import WeightAverage
    from herd.train.batches import Batch, BatchSource, PackedSource
    from herd.train.callbacks import Callback, StepRecord, Verdict
    from herd.train.compilation import eager
    from herd.train.config import TrainConfig
    from herd.train.losses import chunked_cross_entropy, next_token_loss
    from herd.train.optimizers import Muon, build_optimizer
    from herd.train.peak import matmul_peak
    from herd.train.schedule import lr_factor
    from herd.train.state import StateStore
    from herd.train.trainer import Trainer, TrainResult
    from herd.train.world import World, current_world

__getattr__ = lazy_names(
    __name__,
    {
        "averaging": ("WeightAverage",),
        "batches": ("Batch", "BatchSource", "PackedSource"),
        "callbacks": ("Callback", "StepRecord", "Verdict"),
        "compilation": ("eager",),
        "config": ("TrainConfig",),
        "losses": ("chunked_cross_entropy", "next_token_loss"),
        "optimizers": ("Muon", "build_optimizer"),
        "peak": ("matmul_peak",),
        "schedule": ("lr_factor",),
        "state": ("StateStore",),
        "trainer": ("TrainResult", "Trainer"),
        "world": ("World", "current_world"),
    },
)

__all__ = [
    "Batch",
    "BatchSource",
    "Callback",
    "Muon",
    "PackedSource",
    "StateStore",
    "StepRecord",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Verdict",
    "WeightAverage",
    "World",
    "build_optimizer",
    "chunked_cross_entropy",
    "current_world",
    "eager",
    "lr_factor",
    "matmul_peak",
    "next_token_loss",
]
