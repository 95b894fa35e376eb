"""The API's description: OpenAPI 3.1, whose schemas are the types that requests are checked against, and those of
`answer_types`."""

from __future__ import annotations

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

from herd import __version__
from herd.serve.security import OPEN

Routes = tuple[tuple[str, str, Any], ...]  # method, path and handler, which was marked by `takes` and `gives`

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@functools.cache
def describe(routes: Routes) -> dict[str, Any]:
    """All routes, what they take and give, and how errors look."""
    bodies = [body for _, _, handler in routes if (body := getattr(handler, "body", None))]
    answers = [answer for _, _, handler in routes if not isinstance(answer := handler.answer, str)]
    names, schemas = models_json_schema(
        [(kind, "validation") for kind in dict.fromkeys([*bodies, *answers])],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for method, path, handler in routes:
        body, answer = getattr(handler, "body", None), handler.answer
        content: dict[str, Any] = {answer: {}}
        if not isinstance(answer, str):
            content = {"application/json": {"schema": names[answer, "validation"]}}
        if body is not None and "stream" in body.names():
            content["text/event-stream"] = {}
        operation: dict[str, Any] = {
            "operationId": handler.__name__,
            "summary": (handler.__doc__ or "").split("\n")[0],
            "responses": {
                "200": {"description": "The answer.", "content": content},
                "default": {
                    "description": "What went wrong.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
        if body is not None:
            schema = names[body, "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        place = path.replace(":path}", "}")
        if path in OPEN:
            operation["security"] = []
        parameters = [{"name": name, "in": "query", **how} for name, how in getattr(handler, "query", {}).items()]
        if "{" in place:
            name = place.partition("{")[2].partition("}")[0]
            parameters.insert(0, {"name": name, "in": "path", "required": True, "schema": {"type": "string"}})
        if parameters:
            operation["parameters"] = parameters
        paths.setdefault(place, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Herd", "version": __version__},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
