"""checkpoint: weights ⇄ files. Hugging Face safetensors, Meta's .pth and GGUF behind one mapping; without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.checkpoint.adapters import Adapter, LowRank, read_adapter
from herd.checkpoint.convert import convert
from herd.checkpoint.locate import continuing, models_home, pulled_repositories, resolve
from herd.checkpoint.reading import Checkpoint, RawTensor, open_checkpoint
from herd.checkpoint.writing import save
from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.checkpoint.hub import pull

# Downloading brings the HTTP client, which reading a file does not need.
__getattr__ = lazy_names(__name__, {"hub": ("pull",)})

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
