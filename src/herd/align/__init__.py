"""From a base model to one that answers: dialogues with true answers, and supervised fine-tuning on them.

from herd.align import exercises, sft
exercises.generate(seed=0, n=3, split="train")                        # needs no torch
sft.run(sft.SftConfig(exercises=2000), "base/checkpoint", tokenizer, "out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from herd.align.dialogs import Dialog, dialogs
from herd.align.exercises import Exercise

if TYPE_CHECKING:
    from herd.align.sft import SftConfig

__all__ = ["Dialog", "Exercise", "SftConfig", "dialogs"]


def __getattr__(name: str) -> Any:
    if name == "SftConfig":
        return importlib.import_module("herd.align.sft").SftConfig
    if name == "sft":
        return importlib.import_module("herd.align.sft")
    raise AttributeError(f"module 'herd.align' has no attribute {name!r}")
