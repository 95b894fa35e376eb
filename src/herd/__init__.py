"""Herd: the Llama 3 paper as software, from raw text to a model to chat with.

`import herd` is light: rooms load when they are first used, and torch only where training needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from herd.errors import (
    ContextLengthExceeded,
    FileFormatError,
    HerdError,
    MissingDependency,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    from herd.architecture.releases import releases
    from herd.engine import LLM

__version__ = "0.1.0"

_LAZY = {"LLM": ("herd.engine", "LLM"), "releases": ("herd.architecture.releases", "releases")}
_ROOMS = (
    "architecture",
    "tokenizer",
    "checkpoint",
    "model",
    "engine",
    "corpus",
    "train",
    "pretrain",
    "align",
    "evaluate",
    "recipe",
)

__all__ = [
    "LLM",
    "ContextLengthExceeded",
    "FileFormatError",
    "HerdError",
    "MissingDependency",
    "ResourceError",
    "UsageError",
    "__version__",
    "releases",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _ROOMS:
        return importlib.import_module(f"herd.{name}")
    raise AttributeError(f"module 'herd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
