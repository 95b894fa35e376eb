"""What answers look like, for the API's description: types that nothing here is built from, and tests hold answers to.

Answers are put together as plain objects, as some are streamed, and some come in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import Field

H = TypeVar("H", bound=Callable[..., Any])


def gives(answer: type[AnswerType] | str) -> Callable[[H], H]:
    """Note what a handler answers, for the API's description: an object of this type, or something of a media type."""

    def mark(handler: H) -> H:
        handler.answer = answer  # type: ignore[attr-defined]
        return handler

    return mark


class AnswerType(pydantic.BaseModel):
    """Base of all. There is nothing else in one than what is said here."""

    model_config = pydantic.ConfigDict(extra="forbid")


class Health(AnswerType):
    status: Literal["ok"]


class Ready(AnswerType):
    status: Literal["ready"]
    models: list[str] = Field(description="Those that are loaded.")
    replicas: int | None = Field(default=None, description="That are ready, where there are some.")


class ModelEntry(AnswerType):
    """OpenAI's and Anthropic's fields, and for a model that is loaded Herd's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["herd"]
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    loaded: bool
    context_length: int | None = None
    fingerprint: str | None = None
    running: int | None = None
    waiting: int | None = None


class ModelList(AnswerType):
    object: Literal["list"]
    data: list[ModelEntry]


class CachedTokens(AnswerType):
    cached_tokens: int


class Usage(AnswerType):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledFunction(AnswerType):
    name: str
    arguments: str


class AnsweredCall(AnswerType):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(AnswerType):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class Logprob(AnswerType):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(AnswerType):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(AnswerType):
    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(AnswerType):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(AnswerType):
    """Of each token; the first of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(AnswerType):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(AnswerType):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class AnsweredText(AnswerType):
    type: Literal["text"]
    text: str


class AnsweredToolUse(AnswerType):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(AnswerType):
    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(AnswerType):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnsweredText | AnsweredToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(AnswerType):
    input_tokens: int


class Embedding(AnswerType):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or with encoding_format base64 little-endian float32.")


class EmbeddingUsage(AnswerType):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(AnswerType):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Piece(AnswerType):
    id: int
    piece: str


class Tokens(AnswerType):
    tokens: list[int] | list[Piece]


class Content(AnswerType):
    content: str


class OutputTextPart(AnswerType):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(AnswerType):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputTextPart]


class OutputCall(AnswerType):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class Incomplete(AnswerType):
    reason: Literal["max_output_tokens"]


class InputDetails(CachedTokens):
    cache_write_tokens: int


class OutputDetails(AnswerType):
    reasoning_tokens: int


class ResponseUsage(AnswerType):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Failure(AnswerType):
    code: Literal["server_error"]
    message: str


class TextFormat(AnswerType):
    format: dict[str, Any]


class DroppedItem(AnswerType):
    id: str
    type: Literal["message", "function_call", "function_call_output"]
    input_index: int | None


class Response(AnswerType):
    """OpenAI's; formats, tools and choices are as the request has them."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed"]
    background: Literal[False]
    error: Failure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: None
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextFormat
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    dropped_items: list[DroppedItem] | None = Field(default=None, description="With truncation auto: what went.")


class DeletedResponse(AnswerType):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputPart(AnswerType):
    type: Literal["input_text"]
    text: str


class InputMessage(AnswerType):
    type: Literal["message"]
    id: str
    role: Literal["user", "assistant", "system", "developer"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[InputPart | OutputTextPart]


class InputCall(OutputCall):
    status: Literal["in_progress", "completed", "incomplete"]  # type: ignore[assignment]


class CallResult(AnswerType):
    type: Literal["function_call_output"]
    id: str
    call_id: str
    output: str | list[InputPart]
    status: Literal["in_progress", "completed", "incomplete"]


class InputItems(AnswerType):
    object: Literal["list"]
    data: list[InputMessage | InputCall | CallResult]
    first_id: str
    last_id: str
    has_more: bool
