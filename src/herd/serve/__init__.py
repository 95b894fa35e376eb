"""serve: an OpenAI-compatible server and a chat page, on the engine. Needs the extra [serve]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.serve.app import create_app
    from herd.serve.config import ServeConfig
    from herd.serve.keys import Keys, read_keys
    from herd.serve.registry import Registry
    from herd.serve.server import serve

__getattr__ = lazy_names(
    __name__,
    {
        "app": ("create_app",),
        "config": ("ServeConfig",),
        "keys": ("Keys", "read_keys"),
        "registry": ("Registry",),
        "server": ("serve",),
    },
)

__all__ = ["Keys", "Registry", "ServeConfig", "create_app", "read_keys", "serve"]
