"""How tools are described to a Llama and how it writes its calls.

Sources: meta-llama/llama-models `models/llama3/prompt_templates/system_prompts.py`, `models/llama3/tool_utils.py` and
the prompt_format.md of 3.1, 3.2 and 3.3. Three things are done more strictly than there: JSON-schema parameters are
passed whole instead of by name only, strings in calls are escaped, and dictionaries are written as Python's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herd.errors import UsageError
from herd.tokenizer.chat.messages import Call

SEARCHES = ("brave_search", "wolfram_alpha")  # called as brave_search.call(query="…")
CODE_INTERPRETER = "code_interpreter"  # called by writing the code itself
BUILT_IN = (*SEARCHES, CODE_INTERPRETER)

ENVIRONMENT = "Environment: ipython"


@dataclass(frozen=True)
class Tools:
    """The tools of a dialogue: Meta's built-in ones by name, and functions as their descriptions."""

    built_in: tuple[str, ...]
    functions: tuple[dict[str, Any], ...]


def check_tools(tools: Sequence[object] | None) -> Tools:
    """Accepts OpenAI's {"type": "function", "function": {…}}, the inner object alone, and names of built-in tools."""
    if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str)):
        raise UsageError("tools must be a list", value=tools, allowed=f"functions, {', '.join(BUILT_IN)}")
    built_in, functions = [], []
    for index, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(tool, str) and tool in BUILT_IN:
            built_in.append(tool)
        elif isinstance(function, Mapping) and isinstance(function.get("name"), str):
            functions.append(_function(f"tools[{index}]", function))
        else:
            raise UsageError(
                f"tools[{index}] is not a tool",
                value=tool,
                allowed=f'{{"name": …, "description": …, "parameters": JSON schema}} or one of {", ".join(BUILT_IN)}',
            )
    return Tools(tuple(built_in), tuple(functions))


def _function(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    """Name, description and JSON schema of a function, nothing else."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping) or not isinstance(schema.get("required", []), (list, tuple)):
        raise UsageError(f"{where}.parameters is not a JSON schema", value=schema, allowed='{"type": "object", …}')
    found = {
        "name": function["name"],
        "description": function.get("description", ""),
        "parameters": dict(schema),
    }
    try:
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error})", value=function["name"]) from None
    return found


def environment_lines(tools: Tools, *, always: bool) -> str:
    """The first lines of a 3.x system prompt: code may be run, and these searches exist. Empty without them."""
    searches = [name for name in tools.built_in if name in SEARCHES]
    if not tools.built_in and not (always and tools.functions):
        return ""
    return "\n".join([ENVIRONMENT, *([f"Tools: {', '.join(searches)}"] if searches else [])])


def json_instructions(tools: Tools) -> str:
    """3.1: a user message that lists the functions and asks for calls as JSON."""
    listed = "\n".join(
        json.dumps({"type": "function", "function": function}, indent=4, ensure_ascii=False)
        for function in tools.functions
    )
    return (
        "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        "Here is a list of functions in JSON format:\n"
        f"{listed}\n\nReturn function calls in JSON format."
    )


def pythonic_instructions(tools: Tools) -> str:
    """3.2, 3.3 and 4: a system prompt that lists the functions and asks for calls as a Python list."""
    listed = json.dumps([_pythonic(function) for function in tools.functions], indent=4, ensure_ascii=False)
    return (
        "You are an expert in composing functions. You are given a question and a set of possible functions.\n"
        "Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\n"
        "If none of the function can be used, point it out. If the given question lacks the parameters required by the"
        " function,\n"
        "also point it out. You should only return the function call in tools call sections.\n\n"
        "If you decide to invoke any of the function(s), you MUST put it in the format of"
        " [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]\n"
        "You SHOULD NOT include any other text in the response.\n\n"
        "Here is a list of functions in JSON format that you can invoke.\n\n"
        f"{listed}"
    )


def _pythonic(function: dict[str, Any]) -> dict[str, Any]:
    """Meta's order of keys, and "dict" where JSON schema says "object"."""
    schema = function["parameters"]
    rest = {key: value for key, value in schema.items() if key not in ("type", "required", "properties")}
    parameters = {
        "type": "dict",
        "required": list(schema.get("required", [])),
        "properties": schema.get("properties", {}),
        **rest,
    }
    return {**function, "parameters": parameters}


def search_call(call: Call) -> str:
    """brave_search.call(query="…")"""
    if set(call.arguments) != {"query"}:
        raise UsageError(f"{call.name} takes one argument", value=call.arguments, allowed='{"query": "…"}')
    return f"{call.name}.call(query={_literal(call.arguments['query'])})"


def code_call(call: Call) -> str:
    """The code itself."""
    code = call.arguments.get("code")
    if not isinstance(code, str):
        raise UsageError(f"{call.name} takes one argument", value=call.arguments, allowed='{"code": "…"}')
    return code


def json_call(call: Call) -> str:
    """3.1's {"type": "function", "name": …, "parameters": …}."""
    try:
        return json.dumps(
            {"type": "function", "name": call.name, "parameters": call.arguments}, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"the arguments of {call.name} are not JSON ({error})", value=call.arguments) from None


def is_pythonic(call: Call) -> bool:
    """Whether Python's form can say it: it needs names of letters, digits and _."""
    return all(name.isidentifier() for name in (*call.name.split("."), *call.arguments))


def pythonic_calls(calls: Sequence[Call]) -> str:
    """[f(a=1), g(b="x")]: a list of calls that Python parses back (but for arguments named as its keywords)."""
    written = (
        f"{c.name}({', '.join(f'{key}={_literal(value)}' for key, value in c.arguments.items())})" for c in calls
    )
    return f"[{', '.join(written)}]"


def _literal(value: object) -> str:
    """A Python literal; strings in double quotes, as in Meta's examples."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError("an argument of a tool call must be JSON", value=value)
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    raise UsageError("an argument of a tool call must be JSON", value=value)
