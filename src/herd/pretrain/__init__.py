"""Next-token training from raw weights: tokenise and pack a corpus, fit the steps to the time there is, train, save.

    >>> result = run(PretrainConfig(), llama_config, "corpus", tokenizer, "runs/base")

Names load when they are first used: `PretrainConfig` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.pretrain.config import PretrainConfig
    from herd.pretrain.extending import extend
    from herd.pretrain.extension import CARD, CardStage, ExtendConfig, ExtensionStage, plan_extension
    from herd.pretrain.heldout import HeldOut
    from herd.pretrain.stage import run

__getattr__ = lazy_names(
    __name__,
    {
        "config": ("PretrainConfig",),
        "extending": ("extend",),
        "extension": ("CARD", "CardStage", "ExtendConfig", "ExtensionStage", "plan_extension"),
        "heldout": ("HeldOut",),
        "stage": ("run",),
    },
)

__all__ = [
    "CARD",
    "CardStage",
    "ExtendConfig",
    "ExtensionStage",
    "HeldOut",
    "PretrainConfig",
    "extend",
    "plan_extension",
    "run",
]
