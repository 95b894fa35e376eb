"""replicas: one server, several processes that have the model, through Ray Serve. Needs the extra [ray]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.lazy import lazy_names

if TYPE_CHECKING:
    from herd.serve.replicas.cluster import Cluster, check_replicas
    from herd.serve.replicas.front import Front, serve_replicas
    from herd.serve.replicas.prefix_router import PrefixRouter, beginning, blocks_of

__getattr__ = lazy_names(
    __name__,
    {
        "cluster": ("Cluster", "check_replicas"),
        "front": ("Front", "serve_replicas"),
        "prefix_router": ("PrefixRouter", "beginning", "blocks_of"),
    },
)

__all__ = ["Cluster", "Front", "PrefixRouter", "beginning", "blocks_of", "check_replicas", "serve_replicas"]
