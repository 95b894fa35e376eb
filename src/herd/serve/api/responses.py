"""POST /v1/responses, and what is kept of it: answers in the shape of OpenAI's newer API.

Without `herd serve --store FILE` nothing is kept: then `store` may be left out or false. With it, what is not said to
be `"store": false` is kept, as OpenAI does it, for the key that asked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Grammar, Sampling
from herd.engine.request import DEFAULT_MAX_TOKENS
from herd.serve.api.answer_types import DeletedResponse, InputItems, gives
from herd.serve.api.answer_types import Response as ResponseType
from herd.serve.api.body import Body, parse_body, read_json, takes
from herd.serve.api.context import Call, begin, counted, json_response, stream_response
from herd.serve.api.conversation import characters_of, prompt_ids
from herd.serve.api.fields import Generation, Id
from herd.serve.api.formats import JsonObject, JsonSchema, PlainText, SchemaFormat, held_to
from herd.serve.api.response_answer import Answer
from herd.serve.api.response_items import (
    Item,
    MessageItem,
    check_ids,
    dialogue,
    fit,
    new_item_id,
    read_item,
    unsupported,
    with_outputs,
)
from herd.serve.api.tools import (
    FunctionName,
    FunctionTool,
    NamedFunction,
    NamedTool,
    Plan,
    Tool,
    ToolChoice,
    plan_tools,
)
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError, bad
from herd.serve.store import Store

_MAX_ITEMS = 4096  # in a request, with those of the conversation that it goes on with
_LOGPROBS = "message.output_text.logprobs"
_NO_STORE = "responses are not kept here; start the server with --store FILE"
_SHORTEN = "shorten the input, or leave the oldest turns out with truncation: auto"
_SHORTEN_LAST = "shorten the last turn, as all others are left out, or the instructions"


class NamedSchemaFormat(SchemaFormat, JsonSchema):
    """OpenAI's `text.format`."""


class Reasoning(Body):
    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseStreamOptions(Body):
    """OpenAI's `stream_options`; a response has its usage in any case."""

    include_obfuscation: Literal[False] | None = Field(default=None, description="Not there; events are as they are.")


class TextConfig(Body):
    UNSUPPORTED: ClassVar = {"verbosity": "no Llama has it"}
    format: Annotated[PlainText | JsonObject | NamedSchemaFormat, Field(discriminator="type")] | None = None


class ResponseTool(FunctionTool):
    """A function, in one object where chat has two."""

    UNSUPPORTED: ClassVar = {
        "async": "calls are waited for",
        "allowed_callers": "there are no programs",
        "defer_loading": "all tools are shown to the model",
        "output_schema": "what a function gives is text",
    }
    type: Literal["function"]


class NamedChoice(Body):
    type: Literal["function"]
    name: FunctionName


class ResponsesRequest(Generation):
    """OpenAI's request, and Herd's further fields."""

    UNSUPPORTED: ClassVar = {
        "max_tokens": "use max_output_tokens",
        "n": "a request has one response",
        "access_programs": "there are none",
        "background": "wait for the answer, or stream it",
        "background_options": "there is no background",
        "context_management": "use truncation",
        "conversation": "use previous_response_id",
        "image": "there are no images",
        "max_tool_calls": "there are no built-in tools",
        "moderation": "there is no moderation",
        "prompt": "there are no stored prompts; use instructions and input",
        "prompt_cache_options": "a key's own beginnings are shared in any case",
        "prompt_cache_retention": "a key's own beginnings are shared in any case",
    }
    input: str | Annotated[list[Item], Field(min_length=1, max_length=_MAX_ITEMS)]
    instructions: str | None = Field(default=None, description="A system message, for this response only.")
    previous_response_id: Id | None = Field(default=None, description="The conversation to go on with.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=1 << 30)
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    include: list[Literal["message.output_text.logprobs"]] | None = Field(default=None, max_length=16)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    reasoning: Reasoning | None = Field(default=None, description="No Llama has any.")
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = Field(default=None, description="Keep the response. Without a store false, with one true.")
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: the oldest turns go where not all fit beside max_output_tokens, or else 256."
    )

    @property
    def items(self) -> list[Item]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)

    def plan(self) -> tuple[Sampling, Plan, dict[str, Grammar]]:
        """How tokens are chosen, what tools may be called, and the grammars that must be possible, by their fields."""
        if self.top_logprobs and not self.wants_logprobs:
            raise bad("top_logprobs", f"needs include to have {_LOGPROBS}")
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "needs stream to be true")
        plan = plan_tools(self.functions(), self._choice(), self.parallel_tool_calls, "parameters")
        grammars = plan.grammars(held_to(None if self.text is None else self.text.format, "text.format"))
        grammar = next(iter(grammars.values()), None)
        # A call may begin with a control token; elsewhere they are no part of what is said.
        how = {"grammar": grammar, "logprobs": self.wants_logprobs, "skip_specials": not plan.functions}
        return self.sampling(max_tokens=self.max_output_tokens, **how), plan, grammars

    def functions(self) -> list[Tool]:
        """The tools as chat has them."""
        found: dict[str, Tool] = {}
        for i, tool in enumerate(self.tools or ()):
            if tool.name in found:
                raise bad(f"tools.{i}.name", f"{tool.name!r} is there twice")
            function = FunctionTool.model_validate(tool.model_dump(exclude={"type"}))
            found[tool.name] = Tool(type="function", function=function)
        return list(found.values())

    def _choice(self) -> ToolChoice | None:
        if not isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice
        if self.tool_choice.name not in {tool.name for tool in self.tools or ()}:
            raise bad("tool_choice.name", f"{self.tool_choice.name!r} is not among the tools")
        return NamedTool(type="function", function=NamedFunction(name=self.tool_choice.name))

    def head(self, call: Call, sampling: Sampling, kept: bool) -> dict[str, Any]:
        """The response as long as nothing is in it."""
        wanted = None if self.text is None else self.text.format
        choice = self.tool_choice or "auto"
        return {
            "id": new_item_id("resp"),
            "object": "response",
            "created_at": call.created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "model": call.model.name,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": None,
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": kept,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"} if wanted is None else _given(wanted)},
            "tool_choice": choice if isinstance(choice, str) else _given(choice),
            "tools": [{"parameters": None, "strict": None, **_given(tool)} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": self.truncation or "disabled",
            "usage": None,
            "user": self.user,
        }


def _given(body: Body) -> dict[str, Any]:
    return body.model_dump(by_alias=True, exclude_none=True)


async def _read(request: Request, config: ServeConfig) -> ResponsesRequest:
    return await read_json(request, config, _parsed)


def _parsed(data: dict[str, Any]) -> ResponsesRequest:
    """The request. What lies inside is checked first, by its own kind, so that errors say where and what it is."""
    if data.get("background") is False:
        del data["background"]
    given, tools, choice, text = (data.get(name) for name in ("input", "tools", "tool_choice", "text"))
    if isinstance(given, list) and 1 <= len(given) <= _MAX_ITEMS:
        data["input"] = [read_item(item, f"input.{i}") for i, item in enumerate(given)]
    elif "input" in data and not isinstance(given, str):
        raise bad("input", f"allowed is a text or a list of 1 to {_MAX_ITEMS} items")
    if isinstance(tools, list):
        data["tools"] = [_read_function(tool, f"tools.{i}", ResponseTool) for i, tool in enumerate(tools)]
    if isinstance(choice, dict):
        data["tool_choice"] = _read_function(choice, "tool_choice", NamedChoice)
    if isinstance(text, dict):
        data["text"] = parse_body(text, TextConfig, "text.")
    for wanted in data["include"] if isinstance(data.get("include"), list) else ():
        if wanted != _LOGPROBS:
            raise unsupported("include", wanted, f"there is {_LOGPROBS}")
    return parse_body(data, ResponsesRequest)


def _read_function(data: Any, where: str, kind: type[ResponseTool | NamedChoice]) -> ResponseTool | NamedChoice:
    if not isinstance(data, dict):
        raise bad(where, "allowed is an object")
    if data.get("type") != "function":
        raise unsupported(f"{where}.type", data.get("type"), "tools are functions")
    return parse_body(data, kind, f"{where}.")


@takes(ResponsesRequest)
@gives(ResponseType)
async def responses(request: Request) -> Response:
    """Answer a conversation, at once or as it comes."""
    call, body = await begin(request, lambda config: _read(request, config))
    sampling, plan, grammars = await call.text_work(body.plan)
    store: Store | None = request.app.state.store
    if store is None and body.store:
        raise ApiError(400, f"store: {_NO_STORE}", param="store", code="unsupported_parameter")
    owner, own = call.client.owner, body.items
    earlier = await _earlier(call, store, owner, body.previous_response_id, _MAX_ITEMS - len(own))
    llm = call.model.llm
    tools = [tool.described for tool in body.functions()] if plan.described else None

    def encode(kept: Sequence[Item]) -> list[int]:
        return prompt_ids(llm, dialogue(kept, body.instructions), tools, "input")

    cut = body.truncation == "auto"

    def gathered() -> tuple[list[Item], int]:
        check_ids(own)
        items = with_outputs([*earlier, *own], len(earlier))
        return items, 0 if cut else characters_of(dialogue(items, body.instructions), tools)

    items, characters = await call.text_work(gathered)
    call.check_room(characters, "input")
    room = sampling.max_tokens or min(DEFAULT_MAX_TOKENS, llm.context // 4)
    limit = max(0, llm.context - room) if cut else 1 << 62
    prompt, dropped = await call.text_work(lambda: fit(items, encode, limit, call.most_characters if cut else 1 << 62))
    ticket = await call.submit(
        prompt,
        sampling,
        prompt_in="input",
        limit_in="max_output_tokens",
        advice=_SHORTEN_LAST if cut else _SHORTEN,
        continues_text=False,
        grammars=grammars,
    )
    kept = store is not None and body.store is not False
    head = body.head(call, sampling, kept)
    if body.truncation == "auto":
        numbers = {id(item): i for i, item in enumerate(own)}
        head["dropped_items"] = [
            {"id": item.id, "type": item.type, "input_index": numbers.get(id(item))} for item in dropped
        ]

    async def keep(response: dict[str, Any]) -> None:
        if store is not None and kept:
            await store.put(owner, response, [item.stored() for item in own], _without_logprobs(response["output"]))

    answer = Answer(call, ticket, plan, head, keep, logprobs=body.wants_logprobs)
    if body.stream:
        return stream_response(call, answer.events())
    return await json_response(call, answer.whole())


@counted
@gives(ResponseType)
async def get_response(request: Request) -> Response:
    """A response that was kept, as it was sent."""
    _check_query(request, {"stream": ("false",)})
    store, owner, name = _kept(request)
    found = await store.get(owner, name)
    if found is None:
        raise _not_found(name)
    return Response(found, media_type="application/json")


@counted
@gives(DeletedResponse)
async def delete_response(request: Request) -> Response:
    """Forget a response. What went on from it cannot go on any more."""
    _check_query(request, {})
    store, owner, name = _kept(request)
    if not await store.delete(owner, name):
        raise _not_found(name)
    return Response(orjson.dumps({"id": name, "object": "response", "deleted": True}), media_type="application/json")


@counted
@gives(InputItems)
async def input_items(request: Request) -> Response:
    """The items in the input of the request that made a response, without those of responses before it."""
    _check_query(request, {"order": ("asc", "desc"), "limit": None, "after": None})
    query = request.query_params
    limit = query.get("limit", "20")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= 100:
        raise bad("limit", "allowed is a whole number from 1 to 100")
    store, owner, name = _kept(request)
    newest_first = query.get("order") != "asc"
    most, after = int(limit), query.get("after")
    try:
        items = await store.inputs(owner, name, limit=most + 1, newest_first=newest_first, after=after)
    except KeyError:
        raise bad("after", "there is no such item") from None
    if items is None:
        raise _not_found(name)
    shown = items[:most]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
    listed = {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": len(items) > len(shown)}
    return Response(orjson.dumps(listed), media_type="application/json")


def _kept(request: Request) -> tuple[Store, str, str]:
    """The store, who asks, and the name of the response that is wanted."""
    name = request.path_params["id"]
    store: Store | None = request.app.state.store
    if store is None:
        raise ApiError(404, f"there is no response {name[:100]!r}: {_NO_STORE}", param="id", code="response_not_found")
    return store, request.scope["state"]["client"].owner, name


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"there is no response {name[:100]!r}", param="id", code="response_not_found")


def _check_query(request: Request, known: Mapping[str, Collection[str] | None]) -> None:
    """Nothing is ignored in a query either. `known`: names, and what they may be."""
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise unsupported(name[:100], value, f"there is {', '.join(known) or 'nothing'} to choose here")
        allowed = known[name]
        if allowed is not None and value not in allowed:
            raise unsupported(name, value, f"allowed is {' or '.join(allowed)}")


input_items.query = {  # type: ignore[attr-defined]
    "order": {"schema": {"enum": ["asc", "desc"], "default": "desc"}},
    "limit": {"schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}},
    "after": {"description": "Id of the item before the first one.", "schema": {"type": "string"}},
}


async def _earlier(call: Call, store: Store | None, owner: str, name: str | None, most: int) -> list[Item]:
    """The items of the conversation up to a response. Raises ApiError where there are more than so many."""
    if name is None:
        return []
    if store is None:
        raise ApiError(400, _NO_STORE, param="previous_response_id", code="previous_response_not_found")
    found = await store.conversation(owner, name, call.config.max_body_bytes)
    if len(found) > most:
        message = f"the conversation has {len(found):,} items, and with those of the request {_MAX_ITEMS:,} at most"
        raise ApiError(400, message, param="previous_response_id", code="conversation_too_long")
    return await call.text_work(lambda: [read_item(item, "previous_response_id") for item in found])


def _without_logprobs(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as a conversation goes on with them."""
    return [
        {**item, "content": [{**part, "logprobs": []} for part in item["content"]]} if "content" in item else item
        for item in output
    ]
