"""What clients send and expect in small places: schemas in Anthropic's form, one call, images, methods, advice."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from herd.errors import MissingDependency
from herd.serve import ServeConfig
from herd.serve.api.tools import FunctionTool, Tool, plan_tools
from herd.serve.app import ROUTES
from herd.serve.replicas import check_replicas
from tests.serve.tools import CHAT_TOOL, MESSAGES_TOOL, RESPONSES_TOOL, STRICT_CHAT_TOOL

USER = [{"role": "user", "content": "Who are you?"}]
LOOSE_RESPONSES_TOOL = {**RESPONSES_TOOL, "strict": False}
CALL = {"name": "switch", "parameters": {"on": True}}


class Lamp(pydantic.BaseModel):
    colour: Literal["red", "green"]
    on: bool


@pytest.fixture
def client(served: Any) -> Any:
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


# --- a schema in Anthropic's form -------------------------------------------------------------------------------------


def test_parsed_messages(client: Any) -> None:
    """A random model writes no JSON by itself: pydantic reads each answer, whole and streamed."""
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 300, "messages": USER, "output_format": Lamp}
    found = set()
    for seed in range(6):
        answer = client.messages.parse(extra_body={"seed": seed}, **options)
        assert isinstance(answer.parsed_output, Lamp) and answer.stop_reason == "end_turn"
        found.add((answer.parsed_output.colour, answer.parsed_output.on))
    assert len(found) > 1
    with client.messages.stream(extra_body={"seed": 5}, **options) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
        assert stream.get_final_message().parsed_output == answer.parsed_output
    counted = client.messages.count_tokens(model="tiny", messages=USER, output_format=Lamp).input_tokens
    assert counted == client.messages.count_tokens(model="tiny", messages=USER).input_tokens


@pytest.mark.parametrize(
    ("config", "tools", "param"),
    [
        ({"format": {"type": "json_schema", "schema": {"not": {}}}}, None, "output_config.format.schema"),
        ({"format": {"type": "text"}}, None, "output_config.format.type"),
        ({"effort": "low"}, None, "output_config.effort"),
        (
            {"format": {"type": "json_schema", "schema": {"type": "object"}}},
            [{**MESSAGES_TOOL, "strict": True}],
            "output_config.format.schema",
        ),
    ],
)
def test_schemas_that_cannot_be_held_to(served: Any, config: Any, tools: Any, param: str) -> None:
    body = {"messages": USER, "max_tokens": 9, "output_config": config, "tools": tools}
    with served.client() as http:
        answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


# --- one call at most -------------------------------------------------------------------------------------------------


def streamed(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("single", [True, False])
def test_one_call_of_several(served: Any, single: bool) -> None:
    """A grammar makes the model write two calls; a client that wants one gets the first, in all three APIs."""
    wanted = 1 if single else 2
    text = json.dumps(CALL)
    written = {"type": "regex", "grammar": "".join("\\" + c if c in "{}" else c for c in f"{text}; {text} and so on")}
    several = {"type": "array", "prefixItems": [{"const": CALL}, {"const": CALL}], "minItems": 2, "maxItems": 2}
    several |= {"items": False}
    schema = {"type": "json_schema", "schema": several}
    with served.client() as http:

        def post(path: str, **more: Any) -> Any:
            answer = http.post(path, json={"temperature": 0, **more})
            assert answer.status_code == 200, answer.text
            return answer

        chat = {"messages": USER, "tools": [CHAT_TOOL], "response_format": written, "parallel_tool_calls": not single}
        answer = post("/v1/chat/completions", max_tokens=150, **chat).json()
        (choice,) = answer["choices"]
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["switch"] * wanted
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"on": True}] * wanted
        assert choice["finish_reason"] == "tool_calls"
        assert (choice["message"]["content"] or "").strip() == ("" if single else "and so on")
        events = streamed(post("/v1/chat/completions", max_tokens=150, stream=True, **chat).text)
        deltas = [delta for each in events for delta in each["choices"][0]["delta"].get("tool_calls", ())]
        assert {delta["index"] for delta in deltas} == set(range(wanted))
        arguments = "".join(delta["function"]["arguments"] for delta in deltas)
        assert arguments == "".join(call["function"]["arguments"] for call in calls)
        reasons = []  # broken off in the second call, the first one is whole
        for most in range(10, answer["usage"]["completion_tokens"], 9):
            (cut,) = post("/v1/chat/completions", max_tokens=most, **chat).json()["choices"]
            reasons.append(cut["finish_reason"])
            if reasons[-1] == "tool_calls":
                (call,) = cut["message"]["tool_calls"]
                assert call["function"] == calls[0]["function"]
        assert set(reasons) == ({"length", "tool_calls"} if single else {"length"})

        body = {"input": "Who?", "tools": [LOOSE_RESPONSES_TOOL], "parallel_tool_calls": not single}
        body["text"] = {"format": {**schema, "name": "calls"}}
        response = post("/v1/responses", max_output_tokens=150, **body).json()
        assert [item["type"] for item in response["output"]] == ["function_call"] * wanted
        assert response["status"] == "completed"
        most = response["usage"]["output_tokens"] - 3
        assert post("/v1/responses", max_output_tokens=most, **body).json()["status"] == (
            "completed" if single else "incomplete"
        )

        choice = {"type": "auto", "disable_parallel_tool_use": single}
        body = {"messages": USER, "tools": [MESSAGES_TOOL], "tool_choice": choice, "output_config": {"format": schema}}
        message = post("/v1/messages", max_tokens=150, **body).json()
        assert [block["type"] for block in message["content"]] == ["tool_use"] * wanted
        assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_one_call_however_it_is_cut(pieces: int) -> None:
    """Text before the first call stays, all from the second one on goes."""
    tool = Tool(type="function", function=FunctionTool(name="switch"))
    text = f'Well. <function=switch>{{"on": true}}</function>\n{json.dumps(CALL)}; {json.dumps(CALL)} So.'
    for parallel, calls in ((False, 1), (True, 3), (None, 3)):
        voice = plan_tools([tool], "auto", parallel).voice()
        deltas = []
        for start in range(0, len(text), pieces):
            deltas += voice.push(text[start : start + pieces])
        deltas += voice.finish()
        message = voice.message()
        assert len(message["tool_calls"]) == calls and message["content"].startswith("Well.")
        assert message["content"].endswith("So.") == (calls > 1)
        assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
        assert voice.reason("length") == ("tool_calls" if calls == 1 else "length")
        assert voice.reason("stop") == "tool_calls"


# --- what is not there ------------------------------------------------------------------------------------------------

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
TEXT = {"type": "text", "text": "What is this?"}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [*USER, {"role": "user", "content": list(parts)}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "param", "what"),
    [
        ("/v1/chat/completions", content(TEXT, PICTURE), "messages.1.content.1", "images"),
        ("/v1/chat/completions", content({"type": "input_audio", "input_audio": {}}), "messages.1.content.0", "sounds"),
        ("/v1/chat/completions", content({"type": "file", "file": {}}), "messages.1.content.0", "files"),
        ("/tokenize", {"messages": content(PICTURE)["messages"]}, "messages.1.content.0", "images"),
        ("/v1/messages", content(TEXT, {"type": "image", "source": SOURCE}), "messages.1.content.1", "images"),
        (
            "/v1/messages",
            content({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": SOURCE}]}),
            "messages.1.content.0.content.0",
            "images",
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "images",
        ),
    ],
)
def test_contents_that_are_not_there_yet(served: Any, path: str, body: Any, param: str, what: str) -> None:
    with served.client() as http:
        answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "unsupported_parameter" and error["param"] == param, error
    assert f"{what} are not there yet" in error["message"]


def test_parts_that_nobody_knows(served: Any) -> None:
    """They are told from what is not there yet, and so is what is no part at all."""
    with served.client() as http:
        for part in ({"type": "dream"}, {"type": 3}, {"type": ["image"]}, 5, {"type": "text", "text": 1}):
            error = http.post("/v1/chat/completions", json=content(part)).json()["error"]
            assert error["code"] in ("invalid_value", "missing_parameter") and "not there yet" not in error["message"]


# --- methods ----------------------------------------------------------------------------------------------------------


def test_a_wrong_method_is_told_the_right_ones(served: Any) -> None:
    """The server's own description is the oracle; whatever answers GET answers HEAD."""
    with served.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
        assert len(paths) == len({path for _, path, _ in ROUTES})
        for path, operations in paths.items():
            expected = {method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set())
            answer = http.request("PATCH", path.replace("{name}", "tiny").replace("{id}", "x"), json={})
            assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == expected
        assert "allow" not in http.get("/nowhere").headers


# --- advice -----------------------------------------------------------------------------------------------------------


def test_no_advice_that_was_followed_already(served: Any) -> None:
    with served.client() as http:

        def message(**more: Any) -> str:
            answer = http.post("/v1/responses", json={"input": "word " * 600, **more})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
            return str(answer.json()["error"]["message"])

        assert "truncation: auto" in message() and "truncation: auto" in message(truncation="disabled")
        cut = message(truncation="auto")
        assert "truncation" not in cut and "512" in cut and "instructions" in cut


def test_strict_functions_are_held_as_before() -> None:
    """Their grammar has one call where one is wanted, so nothing has to be left out."""
    tool = Tool.model_validate(STRICT_CHAT_TOOL)
    one, more = (plan_tools([tool], "auto", parallel) for parallel in (False, True))
    assert one.grammar is not None and more.grammar is not None and one.grammar != more.grammar


def test_the_fix_for_a_missing_ray(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """A shell takes it as it stands: without the quotes, some look for files of that name. It needs no index that has
    Herd, and asks for what the extra does."""
    found: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(MissingDependency) as caught:
        check_replicas(2, ServeConfig(), {})
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"-m pip install '{extras['ray'][-1]}'" in str(caught.value) and caught.value.exit_code == 3
