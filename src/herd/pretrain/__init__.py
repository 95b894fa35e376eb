"""Next-token training from raw weights: tokenise and pack a corpus, fit the steps to the time there is, train, save.

    >>> result = run(PretrainConfig(), llama_config, "corpus", tokenizer, "runs/base")

Names load when they are first used: `PretrainConfig` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herd.pretrain.config import PretrainConfig
    from herd.pretrain.heldout import HeldOut
    from herd.pretrain.stage import run

_HOME = {"PretrainConfig": "config", "HeldOut": "heldout", "run": "stage"}

__all__ = ["HeldOut", "PretrainConfig", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'herd.pretrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"herd.pretrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
