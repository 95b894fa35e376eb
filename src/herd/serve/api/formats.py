"""What an answer must look like: OpenAI's `response_format`, and grammars."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from herd.engine import Grammar
from herd.serve.api.body import Body

GrammarText = Annotated[str, Field(min_length=1, max_length=1 << 16)]


class PlainText(Body):
    type: Literal["text"]


class JsonObject(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool | None = Field(default=None, description="Schemas are always held to; what cannot be is refused.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(Body):
    """Herd's own: a Lark grammar, as llguidance reads it, or a regular expression."""

    type: Literal["lark", "regex"]
    grammar: GrammarText


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchemaFormat | GrammarFormat, Field(discriminator="type")]


def grammar_of(wanted: PlainText | JsonObject | JsonSchemaFormat | GrammarFormat | None) -> Grammar | None:
    """The engine's grammar; None where an answer may be anything."""
    if isinstance(wanted, JsonObject):
        return Grammar.json_object()
    if isinstance(wanted, JsonSchemaFormat):
        return Grammar.json_schema(wanted.json_schema.schema_)
    if isinstance(wanted, GrammarFormat):
        return Grammar.lark(wanted.grammar) if wanted.type == "lark" else Grammar.regex(wanted.grammar)
    return None
