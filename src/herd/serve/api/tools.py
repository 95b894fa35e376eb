"""Tools of a chat request: which are offered, which must be called, and calls on their way out as OpenAI has them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from herd.engine import Grammar
from herd.serve.api.body import Body
from herd.serve.errors import bad
from herd.tokenizer import ArgumentsDelta, CallParser, CallStart, TextDelta

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")]
_MOST_CALLS = 16  # in one answer that must consist of calls


class FunctionTool(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of an object.")
    strict: bool | None = Field(default=None, description="Held to where a call is asked for; else the model's word.")


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionTool

    @property
    def described(self) -> dict[str, Any]:
        """The same for the tokenizer."""
        given = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": given}


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class Plan:
    """What was decided about tools."""

    functions: frozenset[str] = frozenset()
    """Names that are calls when the model writes them."""
    described: bool = False
    """The model is told of the tools."""
    grammar: Grammar | None = None
    """What an answer must be, where it must be a call."""

    def voice(self) -> Voice:
        return Voice(self.functions)


def plan_tools(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> Plan:
    """Raises ApiError for choices that contradict the tools."""
    by_name: dict[str, FunctionTool] = {}
    for i, tool in enumerate(tools or ()):
        if tool.function.name in by_name:
            raise bad(f"tools.{i}.function.name", f"{tool.function.name!r} is there twice")
        by_name[tool.function.name] = tool.function
    if not by_name:
        if choice not in (None, "none", "auto"):
            raise bad("tool_choice", "there are no tools")
        return Plan()
    if choice == "none":
        return Plan(described=False)
    names = frozenset(by_name)
    if choice in (None, "auto"):
        return Plan(names, described=True)
    if isinstance(choice, NamedTool):
        if choice.function.name not in by_name:
            raise bad("tool_choice.function.name", f"{choice.function.name!r} is not among the tools")
        names = frozenset({choice.function.name})
    schema: dict[str, Any] = {"anyOf": [_call_schema(by_name[name]) for name in sorted(names)]}
    if parallel and not isinstance(choice, NamedTool):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": _MOST_CALLS}
    return Plan(names, described=True, grammar=Grammar.json_schema(schema))


def _call_schema(function: FunctionTool) -> dict[str, Any]:
    """A call in the form of Llama 3.1, which is read from every generation."""
    parameters: Mapping[str, Any] = function.parameters or {"type": "object", "properties": {}}
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "parameters": dict(parameters)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


class Voice:
    """One answer on its way out: text and calls, in pieces and as a whole. The pieces add up to the whole."""

    def __init__(self, functions: frozenset[str]) -> None:
        self._parser = CallParser(functions) if functions else None
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """OpenAI's deltas for a piece of text."""
        if self._parser is None:
            return self._take([TextDelta(text)]) if text else []
        return self._take(self._parser.push(text))

    def finish(self) -> list[dict[str, Any]]:
        return [] if self._parser is None else self._take(self._parser.finish())

    def reason(self, finish_reason: str) -> str:
        """Why the answer ended, as clients expect it."""
        if self._calls and finish_reason == "stop":
            return "tool_calls"
        return "length" if finish_reason == "length" else "stop"

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        calls = [_call(call["id"], call["name"], "".join(call["parts"])) for call in self._calls]
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"tool_calls": calls, "content": content or None}
        return message

    def _take(self, deltas: list[TextDelta | CallStart | ArgumentsDelta]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self._content.append(delta.text)
                out.append({"content": delta.text})
            elif isinstance(delta, CallStart):
                call: dict[str, Any] = {"id": f"call_{secrets.token_hex(12)}", "name": delta.name, "parts": []}
                self._calls.append(call)
                out.append({"tool_calls": [{"index": delta.index, **_call(call["id"], delta.name, "")}]})
            else:
                self._calls[delta.index]["parts"].append(delta.text)
                out.append({"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]})
        return out


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
