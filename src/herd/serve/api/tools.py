"""Tools of a chat request: which are offered, which must be called, and calls on their way out as OpenAI has them."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from herd.engine import Grammar
from herd.errors import UsageError
from herd.serve.api.body import Body
from herd.serve.api.tool_grammar import Held, answers, read_schema
from herd.serve.errors import bad
from herd.tokenizer import ArgumentsDelta, CallParser, CallStart, TextDelta

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")]


class FunctionTool(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of an object.")
    strict: bool | None = Field(default=None, description="Calls are held to the parameters with tool_choice auto too.")


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
    """What an answer must be, where calls are held to schemas."""
    free: bool = True
    """An answer may be text."""

    single: bool = False
    """An answer has one call at most: of several that the model writes, the first."""
    schemas: dict[str, Grammar] = dataclasses.field(default_factory=dict)
    """Those that calls are held to, by the fields of the request where they are."""

    def grammars(self, wanted: dict[str, Grammar]) -> dict[str, Grammar]:
        """What must be possible, by the fields that ask for it; the first one is what an answer must be.

        `wanted` is what is asked of texts. The bounds on what it takes to compile the first are on all schemas
        together; the others are looked at by themselves as no call of a function may be possible.
        """
        if self.grammar is None:
            return wanted
        if self.free and wanted:
            told = "is not there together with strict functions, unless tool_choice is required or none"
            raise bad(next(iter(wanted)), told)
        return {"tools": self.grammar, **self.schemas}

    def voice(self) -> Voice:
        # Under a grammar, calls are what an answer begins with, and text holds none.
        return Voice(self.functions, anywhere=self.grammar is None, single=self.single)


def plan_tools(
    tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None, schemas_in: str = "function.parameters"
) -> Plan:
    """Raises ApiError for choices that contradict the tools, and schemas that cannot be held to.

    `schemas_in`: where a tool of the request has its schema, for errors. Without a word on `parallel` an answer that
    must be a call is one, and another one may be several.
    """
    by_name: dict[str, FunctionTool] = {}
    named_in = "function.name" if schemas_in.startswith("function.") else "name"
    for i, tool in enumerate(tools or ()):
        if tool.function.name in by_name:
            raise bad(f"tools.{i}.{named_in}", f"{tool.function.name!r} is there twice")
        by_name[tool.function.name] = tool.function
    if not by_name:
        if choice not in (None, "none", "auto"):
            raise bad("tool_choice", "there are no tools")
        return Plan()
    if choice == "none":
        return Plan(described=False)
    if isinstance(choice, NamedTool) and choice.function.name not in by_name:
        raise bad(f"tool_choice.{named_in}", f"{choice.function.name!r} is not among the tools")
    names = frozenset({choice.function.name} if isinstance(choice, NamedTool) else by_name)
    free = choice in (None, "auto")
    if free and not any(function.strict for function in by_name.values()):
        return Plan(names, described=True, single=parallel is False)
    schemas = {
        name: (where := f"tools.{i}.{schemas_in}", _of_object(where, function.parameters))
        for i, (name, function) in enumerate(by_name.items())
        if name in names and (function.strict or not free)
    }
    held = [Held(name, _read(*schemas[name]) if name in schemas else None) for name in by_name if name in names]
    several = parallel is not False if free else bool(parallel) and not isinstance(choice, NamedTool)
    try:
        grammar = answers(held, several=several, text=free)
    except UsageError as error:
        raise bad("tools", str(error)) from None
    alone = {where: Grammar.json_schema(schema) for where, schema in schemas.values()}
    return Plan(names, described=True, grammar=grammar, free=free, schemas=alone)


def _of_object(where: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object: anything else in a call's place is text."""
    if not schema:
        return {"type": "object", "properties": {}}
    if schema.get("type", "object") not in ("object", ["object"]):
        raise bad(where, "the parameters of a function are of type object")
    return {"type": "object", **schema}


def _read(where: str, schema: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_schema(schema)
    except UsageError as error:
        raise bad(where, str(error)) from None


class Voice:
    """One answer on its way out: text and calls, in pieces and as a whole. The pieces add up to the whole.

    With `single`, what comes from the second call on is left out: a client that wants one call could not answer more.
    """

    def __init__(self, functions: frozenset[str], *, anywhere: bool, single: bool = False) -> None:
        self._parser = CallParser(functions, anywhere=anywhere) if functions else None
        self._single = single
        self._over = False
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
        if self._calls and (finish_reason == "stop" or self._over):  # then the first call is whole
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
            if self._single and self._calls and isinstance(delta, CallStart):
                self._over = True
            if self._over:
                break
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
