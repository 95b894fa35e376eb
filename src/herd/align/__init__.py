"""From a base model to one that answers: dialogues with true answers, and supervised fine-tuning on them.

from herd.align import exercises, sft
exercises.generate(seed=0, n=3, split="train")                        # needs no torch
sft.run(sft.SftConfig(exercises=2000), "base/checkpoint", tokenizer, "out")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.align.dialogs import Dialog, dialogs
from herd.align.exercises import Exercise
from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.align.sft import SftConfig

__getattr__ = lazy_names(__name__, {"sft": ("SftConfig",)})

__all__ = ["Dialog", "Exercise", "SftConfig", "dialogs"]
