"""From the engine's chunks to what a client reads: texts, tool calls, log-probabilities, usage."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from herd.engine import Chunk, Completion
from herd.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    """An identifier that is given once."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage_of(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """OpenAI's `usage`. The prompt counts once, however many answers it has."""
    completion_tokens = sum(completion.usage.completion_tokens for completion in completions)
    first = completions[0].timings if completions else None
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": first.reused_tokens if first else 0},
    }


def total_of(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`usage` of several prompts, at least one; what was remembered is that of the first."""
    summed = {name: sum(usage[name] for usage in usages) for name in usages[0] if name.endswith("_tokens")}
    return {**usages[0], **summed}


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """A token as text, what is no character as U+FFFD, and its bytes."""
    raw = tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", "replace"), list(raw)


def chat_logprob(tokenizer: Tokenizer, chunk: Chunk) -> dict[str, Any]:
    """A token of chat's `logprobs.content`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}

    top = [entry(token_id, logprob) for token_id, logprob in chunk.top_logprobs or ()]
    return {**entry(chunk.token_id, chunk.logprob or 0.0), "top_logprobs": top}


def finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot come has -9999, as in OpenAI's answers."""
    return max(logprob, -9999.0)
