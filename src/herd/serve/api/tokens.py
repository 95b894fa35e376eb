"""POST /tokenize, /detokenize and /v1/embeddings; GET /v1/models."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from herd.errors import ContextLengthExceeded
from herd.serve.api.answer_types import Content, EmbeddingList, ModelEntry, ModelList, Tokens, gives
from herd.serve.api.body import Body, read_body, takes
from herd.serve.api.context import Call, begin, json_response
from herd.serve.api.conversation import ChatMessage, characters_of, dialogue, prompt_ids
from herd.serve.api.fields import Id, Ids, Whole
from herd.serve.api.tools import Tool
from herd.serve.errors import bad, too_long
from herd.serve.parts import SLICE, lists_in_parts
from herd.serve.registry import Registry

MOST_CHARACTERS = 1 << 20  # more may be no prompt of any model
MOST_TEXTS = 2048
"""To embed in a request, as OpenAI takes them: one is done after the other."""
_PIECES = 1 << 16  # each is an object of its own
_NUMBER, _PACKED, _HEAD = 22, 6, 64  # bytes in JSON: of a number, of one in base64, and around a vector


class TokenizeRequest(Body):
    """A text, or a dialogue as chat would send it."""

    model: str | None = Field(default=None, max_length=200)
    content: str | None = Field(default=None, max_length=MOST_CHARACTERS)
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special: bool = Field(default=False, description="Put the beginning of a text in front.")
    with_pieces: bool = Field(default=False, description="Each token with its text.")


class DetokenizeRequest(Body):
    model: str | None = Field(default=None, max_length=200)
    tokens: Annotated[list[Whole], Field(max_length=1 << 20, fail_fast=True)]


class EmbeddingRequest(Body):
    """OpenAI's request."""

    UNSUPPORTED: ClassVar = {"dimensions": "a model's vectors have one length"}
    model: str | None = Field(default=None, max_length=200)
    input: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    timeout: float | None = Field(default=None, gt=0, le=86_400, description="Seconds after which to give up.")
    user: Id | None = None


@takes(TokenizeRequest)
@gives(Tokens)
async def tokenize(request: Request) -> Response:
    """Token ids of a text or a dialogue. Content never becomes a control token."""
    call, body = await begin(request, lambda config: read_body(request, config, TokenizeRequest))
    if (body.content is None) == (body.messages is None):
        raise bad("content", "give either content or messages")
    if body.messages is not None and body.add_special:
        raise bad("add_special", "is for content; messages have their beginning")
    if body.content is not None and body.tools is not None:
        raise bad("tools", "are for messages")
    messages = None if body.messages is None else dialogue(body.messages)
    tools = [tool.described for tool in body.tools or ()] or None
    characters = len(body.content or "") if messages is None else characters_of(messages, tools)
    if characters > MOST_CHARACTERS:
        raise bad("messages", f"allowed are up to {MOST_CHARACTERS:,} characters")
    if body.with_pieces and characters > _PIECES:
        raise bad("with_pieces", f"is there for up to {_PIECES:,} characters")

    def work() -> list[bytes]:
        tokenizer = call.tokenizer
        if messages is not None:
            ids = prompt_ids(call.model.llm, messages, tools)
        else:
            ids = tokenizer.encode(body.content or "")
            if body.add_special and tokenizer.bos_id is not None:
                ids = [tokenizer.bos_id, *ids]

        def shown(some: list[int]) -> list[Any]:
            if not body.with_pieces:
                return some
            return [{"id": i, "piece": tokenizer.token_bytes(i).decode("utf-8", "replace")} for i in some]

        slices = ({"tokens": shown(ids[i : i + SLICE])} for i in range(0, max(1, len(ids)), SLICE))
        return list(lists_in_parts(slices))

    return await json_response(call, call.text_work(work))


@takes(DetokenizeRequest)
@gives(Content)
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    call, body = await begin(request, lambda config: read_body(request, config, DetokenizeRequest))
    size = call.vocabulary
    if (most := max(body.tokens, default=0)) >= size:
        raise bad("tokens", f"token {most} is none of the model's {size}")
    return await json_response(call, call.text_work(lambda: {"content": call.tokenizer.decode(body.tokens)}))


@takes(EmbeddingRequest)
@gives(EmbeddingList)
async def embeddings(request: Request) -> Response:
    """Vectors of texts: the mean of the last layer's states, of length 1."""
    call, body = await begin(request, lambda config: read_body(request, config, EmbeddingRequest), "input")
    return await json_response(call, _embed(call, body))


async def _embed(call: Call, body: EmbeddingRequest) -> list[bytes]:
    """Its JSON, in parts."""
    llm = call.model.llm
    encoded = await call.token_ids(body.input, "input", beside=True)
    longest = max(map(len, encoded))
    if longest > llm.context:
        raise too_long(ContextLengthExceeded(longest, llm.context), "input", "shorten the text")
    tokens, packed = sum(map(len, encoded)), body.encoding_format == "base64"
    call.reserve(tokens, "input")
    call.expect(len(encoded) * (_HEAD + llm.config.dim * (_PACKED if packed else _NUMBER)), "input")
    done = partial(call.done, ())
    found = await call.model.driver.between_steps(llm.embed_in_pieces, encoded, call.client, done)

    def work() -> list[bytes]:
        parts = [b'{"object":"list","data":[']
        for i, vector_D in enumerate(found):
            unit_D = vector_D / np.linalg.norm(vector_D[None], axis=1)  # rounded as LLM.embed does it
            shown = base64.b64encode(unit_D.astype("<f4").tobytes()).decode() if packed else unit_D.tolist()
            parts += [b"," if i else b"", orjson.dumps({"object": "embedding", "index": i, "embedding": shown})]
        tail = {"model": call.model.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        return [*parts, b"],", orjson.dumps(tail)[1:]]

    return await call.text_work(work)


@gives(ModelList)
async def models(request: Request) -> Response:
    """All names, and what is known of those that are loaded."""
    registry: Registry = request.app.state.registry
    return Response(
        orjson.dumps({"object": "list", "data": [_entry(registry, name) for name in registry.paths]}),
        media_type="application/json",
    )


@gives(ModelEntry)
async def model(request: Request) -> Response:
    """One of them."""
    registry: Registry = request.app.state.registry
    name = request.path_params["name"]
    registry.path_of(name)
    return Response(orjson.dumps(_entry(registry, name)), media_type="application/json")


def _entry(registry: Registry, name: str) -> dict[str, Any]:
    """As OpenAI has it, and Anthropic."""
    entry: dict[str, Any] = {"id": name, "object": "model", "created": registry.created, "owned_by": "herd"}
    began = datetime.fromtimestamp(registry.created, UTC).isoformat().replace("+00:00", "Z")
    anthropic = {"type": "model", "display_name": name, "created_at": began, "lifecycle": "active"}
    for loaded in registry.loaded:
        if loaded.name == name:
            entry |= {
                "context_length": loaded.llm.context,
                "fingerprint": loaded.fingerprint,
                "running": loaded.driver.running,
                "waiting": loaded.driver.waiting,
            }
    return {**entry, "loaded": len(entry) > 4, **anthropic}
