"""Fast inference: one face, a continuous-batching scheduler, one sampler, and backends behind them.

`LLM` loads a model and generates, streams, chats, scores and embeds. Importing this room needs no torch; a backend is
imported when a model is loaded.
"""

from __future__ import annotations

from herd.engine.backend import BACKENDS, Backend, BackendOptions, Span
from herd.engine.grammar import Grammar
from herd.engine.llm import LLM
from herd.engine.request import Chunk, Completion, Sampling, SamplingOptions, Score, Timings, Usage
from herd.engine.session import ChatSession

__all__ = [
    "BACKENDS",
    "LLM",
    "Backend",
    "BackendOptions",
    "ChatSession",
    "Chunk",
    "Completion",
    "Grammar",
    "Sampling",
    "SamplingOptions",
    "Score",
    "Span",
    "Timings",
    "Usage",
]
