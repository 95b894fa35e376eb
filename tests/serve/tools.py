"""One tool, as each API writes it."""

from __future__ import annotations

from typing import Any

_NAMED = {"name": "switch", "description": "Turn the light on or off."}
_PARAMETERS = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
CHAT_TOOL: dict[str, Any] = {"type": "function", "function": {**_NAMED, "parameters": _PARAMETERS}}
STRICT_CHAT_TOOL: dict[str, Any] = {"type": "function", "function": {**CHAT_TOOL["function"], "strict": True}}
RESPONSES_TOOL: dict[str, Any] = {"type": "function", **_NAMED, "parameters": _PARAMETERS, "strict": True}
MESSAGES_TOOL: dict[str, Any] = {**_NAMED, "input_schema": _PARAMETERS}
