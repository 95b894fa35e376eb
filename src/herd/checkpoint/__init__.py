"""checkpoint: weights ⇄ files. Hugging Face safetensors, Meta's .pth and GGUF behind one mapping; without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.checkpoint.locate import continuing, models_home, pulled_repositories, resolve
from herd.checkpoint.reading import Checkpoint, RawTensor, open_checkpoint
from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.checkpoint.adapters import Adapter, LowRank, read_adapter
    from herd.checkpoint.conversion import convert
    from herd.checkpoint.hub import pull
    from herd.checkpoint.writing import save

# A model is read more often than one is written or fetched, and the first token waits for what is imported here.
__getattr__ = lazy_names(
    __name__,
    {
        "adapters": ("Adapter", "LowRank", "read_adapter"),
        "conversion": ("convert",),
        "hub": ("pull",),
        "writing": ("save",),
    },
)

__all__ = [
    "Adapter",
    "Checkpoint",
    "LowRank",
    "RawTensor",
    "continuing",
    "convert",
    "models_home",
    "open_checkpoint",
    "pull",
    "pulled_repositories",
    "read_adapter",
    "resolve",
    "save",
]
