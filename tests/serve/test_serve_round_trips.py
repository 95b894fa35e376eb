"""What the server answers goes back to it as it is: objects of the official clients, calls, results in any order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

FUNCTION = {"type": "object", "properties": {}, "additionalProperties": False}
NAMES = ("f", "g")
CHAT_TOOLS: list[Any] = [{"type": "function", "function": {"name": n, "parameters": FUNCTION}} for n in NAMES]
MESSAGES_TOOLS: list[Any] = [{"name": n, "input_schema": FUNCTION} for n in NAMES]
RESPONSES_TOOLS: list[Any] = [{"type": "function", "name": n, "parameters": FUNCTION, "strict": True} for n in NAMES]
USER: list[Any] = [{"role": "user", "content": "hi"}]
MOST = 160


class Number(pydantic.BaseModel):
    n: int


@pytest.fixture(scope="module", params=["llama3.1", "llama3.2"])
def format_served(request: Any, serving: Any, make_model: Callable[..., Path]) -> Iterator[Any]:
    """A server whose model ends its answers by itself, with one of the chat formats."""
    from herd import tokenizer

    plain = tokenizer.load(make_model())
    small = plain.with_chat_format(request.param)
    with serving({"tiny": make_model(small=small, context_length=2048, seed=3)}) as found:
        assert found.llm.tokenizer.chat_format == request.param
        yield found


@pytest.fixture
def prompts(format_served: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that reach the model from now on."""
    seen: list[list[int]] = []
    submit = format_served.driver.submit

    def noted(prompt: Any, *args: Any, **more: Any) -> Any:
        seen.append(list(prompt))
        return submit(prompt, *args, **more)

    monkeypatch.setattr(format_served.driver, "submit", noted)
    return seen


@pytest.fixture
def client(format_served: Any) -> Any:
    return format_served.openai()


@pytest.fixture
def claude(format_served: Any) -> Any:
    return anthropic.Anthropic(base_url=format_served.url, api_key="none", max_retries=0)


def several(ask: Callable[[int], tuple[Any, list[Any], bool]]) -> tuple[Any, list[Any]]:
    """The first answer with three calls or more, of different functions, that is whole."""
    for seed in range(80):
        try:
            answer, calls, whole = ask(seed)
        except (openai.LengthFinishReasonError, RuntimeError):  # of a stream that was cut, clients have no answer
            continue
        if whole and len(calls) > 2 and len({name for name, _ in calls}) > 1:
            return answer, calls
    pytest.fail("there were never several calls")


def expected(llm: Any, calls: list[tuple[str, str]]) -> list[int]:
    """The prompt, with each result where it belongs. Written here by hand for each format."""
    each = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    results = [{"role": "tool", "content": f"result {i}"} for i in range(len(calls))]
    if llm.tokenizer.chat_format == "llama3.2":
        messages = [*USER, {"role": "assistant", "content": "", "tool_calls": each}, *results]
    else:
        pairs = zip(each, results, strict=True)
        messages = [*USER, *(m for call, r in pairs for m in ({"role": "assistant", "tool_calls": [call]}, r))]
    return list(llm.tokenizer.encode_dialog(messages, CHAT_TOOLS, add_generation_prompt=True).ids)


def shuffled(results: list[Any]) -> list[list[Any]]:
    return [results, results[::-1], random.Random(5).sample(results, len(results))]


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_chat(client: Any, format_served: Any, prompts: list[list[int]], way: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": CHAT_TOOLS, "tool_choice": "required"}
    options |= {"parallel_tool_calls": True, "max_tokens": MOST, "temperature": 1.0}

    def ask(seed: int) -> tuple[Any, list[Any], bool]:
        if way == "stream":
            with client.chat.completions.stream(**options, seed=seed) as stream:
                choice = stream.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**options, seed=seed).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        return choice.message, calls, choice.finish_reason == "tool_calls"

    message, calls = several(ask)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {i}"} for i, call in enumerate(message.tool_calls)
    ]
    prompts.clear()
    for sent, order in zip((message, message, message.model_dump()), shuffled(results), strict=True):
        client.chat.completions.create(model="tiny", messages=[*USER, sent, *order], tools=CHAT_TOOLS, max_tokens=2)
    assert prompts == [expected(format_served.llm, calls)] * 3


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_messages(claude: Any, format_served: Any, prompts: list[list[int]], way: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": MESSAGES_TOOLS, "max_tokens": MOST}
    options |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": False}}

    def ask(seed: int) -> tuple[Any, list[Any], bool]:
        more = {"seed": seed, "temperature": 1.0}
        if way == "stream":
            with claude.messages.stream(**options, extra_body=more) as stream:
                message = stream.get_final_message()
        else:
            message = claude.messages.create(**options, extra_body=more)
        calls = [(block.name, json.dumps(block.input)) for block in message.content if block.type == "tool_use"]
        return message, calls, message.stop_reason == "tool_use"

    message, calls = several(ask)
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": f"result {i}"}
        for i, block in enumerate(message.content)
    ]
    prompts.clear()
    blocks = (message.content, message.content, message.model_dump()["content"])
    for sent, order in zip(blocks, shuffled(results), strict=True):
        said = [*USER, {"role": "assistant", "content": sent}, {"role": "user", "content": order}]
        claude.messages.create(model="tiny", max_tokens=2, tools=MESSAGES_TOOLS, messages=said)
    assert prompts == [expected(format_served.llm, calls)] * 3


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_responses(client: Any, format_served: Any, prompts: list[list[int]], way: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": RESPONSES_TOOLS, "tool_choice": "required"}
    options |= {"parallel_tool_calls": True, "max_output_tokens": MOST}

    def ask(seed: int) -> tuple[Any, list[Any], bool]:
        more = {"seed": seed, "temperature": 1.0}
        if way == "stream":
            with client.responses.stream(**options, extra_body=more) as stream:
                response = stream.get_final_response()
        else:
            response = client.responses.create(**options, extra_body=more)
        calls = [(item.name, item.arguments) for item in response.output if item.type == "function_call"]
        return response, calls, response.status == "completed"

    response, calls = several(ask)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"result {i}"}
        for i, item in enumerate(response.output)
    ]
    prompts.clear()
    dumped = [item.model_dump() for item in response.output]
    for sent, order in zip((response.output, response.output, dumped), shuffled(results), strict=True):
        client.responses.create(model="tiny", max_output_tokens=2, tools=RESPONSES_TOOLS, input=[*USER, *sent, *order])
    assert prompts == [expected(format_served.llm, calls)] * 3


def test_a_name_that_is_none_in_python(client: Any, prompts: list[list[int]], format_served: Any) -> None:
    tool: Any = {"type": "function", "function": {"name": "get-it", "parameters": FUNCTION}}
    options: dict[str, Any] = {"model": "tiny", "tools": [tool], "max_tokens": MOST, "temperature": 0}
    answer = client.chat.completions.create(messages=USER, tool_choice="required", **options).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "get-it"
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    client.chat.completions.create(messages=[*USER, answer.message, result], **options)
    said = format_served.llm.tokenizer.decode(prompts[1])
    assert '{"type": "function", "name": "get-it", "parameters": {}}' in said and said.count("done") == 1


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_parsed_answers_go_back(client: Any, claude: Any) -> None:
    """With what a client's `parse` puts into them: as objects, and as dictionaries."""
    get = openai.pydantic_function_tool(Number, name="get")
    chat: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 100, "temperature": 0}
    parsed = client.chat.completions.parse(response_format=Number, **chat).choices[0].message
    assert isinstance(parsed.parsed, Number)
    called = client.chat.completions.parse(tools=[get], tool_choice="required", **chat).choices[0].message
    with client.chat.completions.stream(tools=[get], tool_choice="required", **chat) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (parsed, called, streamed):
        results = [{"role": "tool", "tool_call_id": c.id, "content": "1"} for c in message.tool_calls or ()]
        assert results or message is parsed
        assert all(isinstance(c.function.parsed_arguments, Number) for c in message.tool_calls or ())
        for sent in (message, message.model_dump(), message.to_dict()):
            again = client.chat.completions.create(model="tiny", messages=[*USER, sent, *results], max_tokens=2)
            assert again.usage.completion_tokens == 2

    tool = {"type": "function", **get["function"]}
    options: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 100, "temperature": 0}
    answers = [
        client.responses.parse(text_format=Number, **options),
        client.responses.parse(tools=[tool], tool_choice="required", **options),
    ]
    assert isinstance(answers[0].output_parsed, Number) and answers[1].output[0].type == "function_call"
    for answer in answers:
        outputs = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "1"}
            for item in answer.output
            if item.type == "function_call"
        ]
        for items in (answer.output, [item.model_dump() for item in answer.output]):
            again = client.responses.create(model="tiny", input=[*USER, *items, *outputs], max_output_tokens=2)
            assert again.usage.output_tokens == 2

    said: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": USER}
    message = claude.messages.parse(output_format=Number, extra_body={"temperature": 0}, **said)
    assert isinstance(message.parsed_output, Number)
    for content in (message.content, message.model_dump()["content"], message.to_dict()["content"]):
        turns = [*USER, {"role": "assistant", "content": content}, *USER]
        assert claude.messages.create(model="tiny", max_tokens=2, messages=turns).usage.output_tokens == 2


def test_an_answer_that_is_begun(claude: Any, format_served: Any, prompts: list[list[int]]) -> None:
    """As Anthropic has it: the answer goes on with the assistant's last message, and what comes back is the rest."""
    llm = format_served.llm
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "extra_body": {"temperature": 0}}
    begun = {"role": "assistant", "content": "Sure: {"}
    answer = claude.messages.create(messages=[*USER, begun], **options)
    head = llm.tokenizer.encode_dialog(USER, add_generation_prompt=True).ids
    assert prompts == [[*head, *llm.tokenizer.encode("Sure: {")]]
    rest = llm.generate(prompts[0], max_tokens=5, temperature=0, skip_specials=True).text
    assert "".join(block.text for block in answer.content) == rest
    counted = claude.messages.count_tokens(model="tiny", messages=[*USER, begun]).input_tokens
    assert counted == len(prompts[0])
    blocks = [{"type": "text", "text": "Sure"}, {"type": "text", "text": ": {"}]
    claude.messages.create(messages=[*USER, {"role": "assistant", "content": blocks}], **options)
    assert prompts[1] == prompts[0]
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    for content, more, field in (
        ("Sure: ", {}, "messages.1.content"),
        ("", {}, "messages.1.content"),
        ([use], {}, "messages.1.content"),
        (
            "{",
            {"output_config": {"format": {"type": "json_schema", "schema": FUNCTION}}},
            "output_config.format.schema",
        ),
        ("{", {"tools": MESSAGES_TOOLS, "tool_choice": {"type": "any"}}, "tools"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=field):
            claude.messages.create(messages=[*USER, {"role": "assistant", "content": content}], **options, **more)
