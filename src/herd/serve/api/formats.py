"""What an answer must look like: OpenAI's `response_format`, and grammars."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from herd.engine import Grammar
from herd.errors import UsageError
from herd.serve.api.body import Body
from herd.serve.errors import bad

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


class SchemaFormat(Body):
    """A schema, in one object where chat has two."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchemaFormat | GrammarFormat, Field(discriminator="type")]


def held_to(
    wanted: PlainText | JsonObject | JsonSchemaFormat | SchemaFormat | GrammarFormat | None, field: str
) -> dict[str, Grammar]:
    """The grammar that the field asks for, by the place where it is; empty where an answer may be anything.

    Raises ApiError, with that place, for what cannot be followed.
    """
    if wanted is None or isinstance(wanted, PlainText):
        return {}
    try:
        if isinstance(wanted, JsonObject):
            return {field: Grammar.json_object()}
        if isinstance(wanted, GrammarFormat):
            field += ".grammar"
            return {field: Grammar.lark(wanted.grammar) if wanted.type == "lark" else Grammar.regex(wanted.grammar)}
        if isinstance(wanted, JsonSchemaFormat):
            field += ".json_schema.schema"
            return {field: Grammar.json_schema(wanted.json_schema.schema_)}
        field += ".schema"
        return {field: Grammar.json_schema(wanted.schema_)}
    except UsageError as error:
        raise bad(field, str(error)) from None
