"""An answer as /v1/responses gives it: the response, and the events of a stream, whose pieces add up to it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from herd.engine import Chunk
from herd.errors import HerdError
from herd.serve.api.answers import chat_logprob
from herd.serve.api.context import Call
from herd.serve.api.response_items import new_item_id
from herd.serve.api.tools import Plan
from herd.serve.sse import event
from herd.serve.ticket import Ticket

log = logging.getLogger("herd.serve")


class Answer:
    """One response: its items, one after the other, and the events that tell of them."""

    def __init__(
        self,
        call: Call,
        ticket: Ticket,
        plan: Plan,
        head: dict[str, Any],
        keep: Callable[[dict[str, Any]], Awaitable[None]],
        *,
        logprobs: bool,
    ) -> None:
        self._call = call
        self._ticket = ticket
        self._voice = plan.voice()
        self._response = head
        self._keep = keep
        self._logprobs = logprobs
        self._pending: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self._item: dict[str, Any] | None = None  # what is being written
        self._pieces: list[str] = []  # of its text or arguments; put together at its end
        self._streams = False
        self._told: list[bytes] = []
        self._number = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        self._streams = True
        begun = False
        try:
            async for _, chunk in self._ticket:
                if not begun:  # not before the first token: until then an error is a status
                    begun = True
                    self._tell("response.created", response=self._response)
                    self._tell("response.in_progress", response=self._response)
                self._take(chunk)
                if self._told:
                    yield self._news()
            await self._keep(self._response)
        except Exception as error:
            if not begun:
                raise
            await self._fail(error)
        self._tell(f"response.{self._response['status']}", response=self._response)
        yield self._news()

    async def whole(self) -> dict[str, Any]:
        async for _, chunk in self._ticket:
            self._take(chunk)
        await self._keep(self._response)
        return self._response

    def _take(self, chunk: Chunk) -> None:
        """What a token adds."""
        deltas = self._voice.push(chunk.text)
        if chunk.completion is not None:
            deltas += self._voice.finish()
        if self._logprobs:
            self._pending.append(chat_logprob(self._call.tokenizer, chunk))
        for delta in deltas:
            if delta.get("content"):
                self._text(delta["content"])
            for call in delta.get("tool_calls", ()):
                self._arguments(call)
        if chunk.completion is not None:
            self._end(chunk)

    def _text(self, text: str) -> None:
        if self._item is None or self._item["type"] != "message":
            if self._item is not None:
                self._pending = _last(self._pending, len(text))  # those of the call have no place
            self._begin_message()
        assert self._item is not None
        self._pieces.append(text)
        self._item["content"][0]["logprobs"] += self._pending
        self._tell_item("response.output_text.delta", content_index=0, delta=text, logprobs=_brief(self._pending))
        self._pending = []

    def _arguments(self, call: dict[str, Any]) -> None:
        if "id" in call:
            item = {"type": "function_call", "id": new_item_id("fc"), "call_id": call["id"]}
            self._begin({**item, "name": call["function"]["name"], "arguments": "", "status": "in_progress"})
        elif call["function"]["arguments"]:
            self._pieces.append(call["function"]["arguments"])
            self._tell_item("response.function_call_arguments.delta", delta=call["function"]["arguments"])

    def _begin_message(self) -> None:
        item = {"type": "message", "id": new_item_id("msg"), "role": "assistant", "status": "in_progress"}
        self._begin({**item, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._response["output"][-1]["content"].append(part)
        self._tell_item("response.content_part.added", content_index=0, part=part)

    def _begin(self, item: dict[str, Any]) -> None:
        self._close()
        self._response["output"].append(item)
        self._item, self._pieces = item, []
        self._tell("response.output_item.added", output_index=len(self._response["output"]) - 1, item=item)

    def _close(self, broke_off: bool = False) -> None:
        """The item that is being written ends."""
        item = self._item
        if item is None:
            return
        written = "".join(self._pieces)
        if item["type"] == "message":
            item["status"] = "incomplete" if broke_off else "completed"
            (part,) = item["content"]
            part["text"] = written
            logprobs = _brief(part["logprobs"])
            self._tell_item("response.output_text.done", content_index=0, text=written, logprobs=logprobs)
            self._tell_item("response.content_part.done", content_index=0, part=part)
        else:
            item["arguments"] = written
            item["status"] = "completed" if _is_object(written) else "incomplete"
            self._tell_item("response.function_call_arguments.done", arguments=written)
        self._tell("response.output_item.done", output_index=len(self._response["output"]) - 1, item=item)
        self._item = None

    def _end(self, last: Chunk) -> None:
        assert last.completion is not None and last.finish_reason is not None
        cut = self._voice.reason(last.finish_reason) == "length"
        if not self._response["output"]:
            self._begin_message()
        self._close(broke_off=cut)
        self._call.done([last.completion], len(self._ticket.prompt))
        prompt_tokens, tokens = len(self._ticket.prompt), last.completion.usage.completion_tokens
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": last.completion.timings.reused_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt_tokens + tokens,
            },
        }

    async def _fail(self, error: Exception) -> None:
        """After the first event, an error is a response too."""
        told = self._call.fail(error)
        self._close(broke_off=True)
        self._response |= {
            "status": "failed",
            "completed_at": None,
            "incomplete_details": None,
            "error": {"code": "server_error", "message": str(told)},
        }
        try:
            await self._keep(self._response)
        except HerdError as failure:
            self._response["store"] = False
            log.error("a response that failed is not kept: %s", failure)

    def _tell_item(self, name: str, **fields: Any) -> None:
        """An event about the item that is being written."""
        assert self._item is not None
        self._tell(name, item_id=self._item["id"], output_index=len(self._response["output"]) - 1, **fields)

    def _tell(self, name: str, **fields: Any) -> None:
        if self._streams:
            self._told.append(event({"type": name, "sequence_number": self._number, **fields}, name))
            self._number += 1

    def _news(self) -> bytes:
        told, self._told = self._told, []
        return b"".join(told)


def _last(logprobs: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Of the last tokens, which make up a text of this length."""
    first = len(logprobs)
    while first and length > 0:
        first -= 1
        length -= len(logprobs[first]["token"])
    return logprobs[first:]


def _brief(logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As events have them: without bytes."""
    return [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in each["top_logprobs"]],
        }
        for each in logprobs
    ]


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
