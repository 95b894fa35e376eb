"""The official client against a served model: its types are the oracle for what is sent, its exceptions for errors."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest

openai = pytest.importorskip("openai")

from tests.serve.tools import CHAT_TOOL  # noqa: E402

USER = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(served: Any) -> Any:
    return served.openai()


def valid(answer: Any) -> Any:
    """The client takes what it gets as it is: this checks it against the types."""
    type(answer).model_validate(answer.model_dump(), strict=True)
    return answer


def test_chat(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 9, "seed": 4, "n": 2}
    whole = valid(client.chat.completions.create(**options, logprobs=True, top_logprobs=3))
    assert [choice.index for choice in whole.choices] == [0, 1] and whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 18 and whole.usage.total_tokens == 18 + whole.usage.prompt_tokens
    texts, logprobs, roles, reasons = ["", ""], [[], []], [0, 0], [None, None]  # type: ignore[var-annotated]
    usage = None
    stream = client.chat.completions.create(
        **options, logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True}
    )
    for chunk in map(valid, stream):
        usage = chunk.usage or usage
        assert chunk.system_fingerprint == whole.system_fingerprint
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and roles == [1, 1]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert reasons == ["length", "length"] and usage == whole.usage
    for choice in whole.choices:
        for token in choice.logprobs.content:
            assert bytes(token.bytes).decode("utf-8", "replace") == token.token and len(token.top_logprobs) == 3


def test_asynchronously(served: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            create = client.chat.completions.create
            whole = await asyncio.gather(*[create(model="tiny", messages=USER, max_tokens=5, seed=i) for i in range(8)])
            parts = []
            async for chunk in await create(model="tiny", messages=USER, max_tokens=5, seed=3, stream=True):
                parts += [choice.delta.content or "" for choice in chunk.choices]
            assert "".join(parts) == whole[3].choices[0].message.content
            return [answer.choices[0].message.content for answer in whole]

    assert len(set(asyncio.run(ask()))) > 1


def test_completions(client: Any) -> None:
    one = valid(client.completions.create(model="tiny", prompt="def f(", max_tokens=6, seed=1, logprobs=2))
    # Without a reason until the last one, which the type does not know and OpenAI sends.
    parts = list(client.completions.create(model="tiny", prompt="def f(", max_tokens=6, seed=1, stream=True))
    assert "".join(part.choices[0].text for part in parts) == one.choices[0].text
    many = valid(client.completions.create(model="tiny", prompt=["def f(", "import"], n=2, max_tokens=6, seed=1))
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3] and many.choices[0].text == one.choices[0].text
    by_ids = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3, seed=1)
    assert by_ids.choices[0].text == client.completions.create(
        model="tiny", prompt=[[5, 6, 7]], max_tokens=3, seed=1
    ).choices[0].text  # fmt: skip
    assert by_ids.usage.prompt_tokens == 3
    stopped = client.completions.create(
        model="tiny", prompt="def f(", max_tokens=6, seed=1, stop=one.choices[0].text[2]
    )
    assert stopped.choices[0].text == one.choices[0].text[:2] and stopped.choices[0].finish_reason == "stop"


def test_scores_of_a_prompt(client: Any, served: Any) -> None:
    """As lm-eval asks for them: one for each token of the prompt, the first null, and those of what was generated."""
    llm = served.llm
    ids = llm.tokenizer.encode_document("def f(x):\n    return x\n")[:-1]
    expected = llm.score(ids).logprobs
    for max_tokens in (0, 1, 3):
        answer = client.completions.create(
            model="tiny", prompt=ids, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1
        )
        found = answer.choices[0].logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-6)
        assert len(found.tokens) == len(ids) + max_tokens == len(found.top_logprobs) == len(found.text_offset)
        for token, top in list(zip(found.tokens, found.top_logprobs, strict=True))[1:]:
            assert token in top and len(top) <= 2  # the likeliest one, and the token itself
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True)
            if top
        ]
        assert all(greedy[len(ids) - 1 :])


def test_places_in_an_echoed_text(client: Any) -> None:
    choice = client.completions.create(model="tiny", prompt="def f(", max_tokens=2, echo=True, logprobs=1).choices[0]
    found = choice.logprobs
    assert choice.text.startswith("def f(") and found.text_offset[:2] == [0, 0]
    for token, place in list(zip(found.tokens, found.text_offset, strict=True))[1:4]:
        assert choice.text[place : place + len(token)] == token


def test_control_tokens_are_in_the_text_where_that_is_asked_for(client: Any, served: Any) -> None:
    """Their places in the text are right in both cases, and so are those of what comes after them."""
    special = served.llm.tokenizer.specials["<|reserved_special_token_9|>"]
    letter = served.llm.tokenizer.encode("x")[0]
    name = served.llm.tokenizer.token_bytes(special).decode()
    how: dict[str, Any] = {"model": "tiny", "prompt": "def f(", "max_tokens": 6, "temperature": 1.0, "logprobs": 1}
    how["logit_bias"] = {str(special): 100, str(letter): 100}
    met = set()
    for seed in range(8):
        for skip, echo in itertools.product((None, True, False), (True, False)):
            more = {} if skip is None else {"skip_special_tokens": skip}
            choice = client.completions.create(**how, seed=seed, echo=echo, extra_body=more).choices[0]
            generated = choice.text.removeprefix("def f(") if echo else choice.text
            tokens, places = choice.logprobs.tokens[-6:], choice.logprobs.text_offset[-6:]
            shown = skip is False
            met |= set(tokens)
            assert generated == "".join(token for token in tokens if shown or token != name)
            for token, place in zip(tokens, places, strict=True):
                assert choice.text[place:].startswith(token) or (token == name and not shown)
        streamed = list(client.completions.create(**how, seed=seed, stream=True))
        assert "".join(part.choices[0].text for part in streamed) == generated.replace(name, "")
    assert met == {name, "x"}


def test_embeddings(client: Any, served: Any) -> None:
    texts = ["def f(x):", "import os", "x"]
    found = valid(client.embeddings.create(model="tiny", input=texts, encoding_format="float"))
    packed = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    expected = served.llm.embed(texts, normalise=True)
    for i, vector in enumerate(expected):
        np.testing.assert_allclose(found.data[i].embedding, vector, atol=1e-6)
        np.testing.assert_allclose(packed.data[i].embedding, vector, atol=1e-6)
    assert found.usage.prompt_tokens == sum(len(served.llm.tokenizer.encode(t)) + 1 for t in texts)
    assert len(client.embeddings.create(model="tiny", input=["x"] * 2048).data) == 2048


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and valid(client.models.retrieve("tiny")).context_length == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "error", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"top_p": "0.5"}, openai.BadRequestError, "top_p", "invalid_value"),
        ({"n": 10_000}, openai.BadRequestError, "n", "invalid_value"),
        ({"n": 17}, openai.BadRequestError, "n", "invalid_value"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, None, "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"messages": [{"role": "me", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         openai.BadRequestError, None, None),
        ({"functions": []}, openai.BadRequestError, "functions", "unsupported_parameter"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "unknown_parameter"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9999999": 1}}, openai.BadRequestError, None, "invalid_value"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs", "invalid_value"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options", "invalid_value"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 513}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_errors_name_the_field(
    client: Any, change: dict[str, Any], error: type[Exception], param: str | None, code: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": USER, "max_tokens": 2} | change))
    assert param is None or caught.value.param == param  # type: ignore[attr-defined]
    assert code is None or caught.value.code == code  # type: ignore[attr-defined]
    assert str(caught.value)


def test_a_prompt_that_is_too_long_says_both_numbers(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"512.*\d{4}") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_parts_and_roles(client: Any) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 2}
    whole = client.chat.completions.create(messages=USER, **options)
    assert client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], **options
    ).choices[0].message.content == whole.choices[0].message.content  # fmt: skip
    system = client.chat.completions.create(messages=[{"role": "system", "content": "x"}, *USER], **options)
    developer = client.chat.completions.create(messages=[{"role": "developer", "content": "x"}, *USER], **options)
    assert system.choices[0].message.content == developer.choices[0].message.content
    # What a client sends back is what it got.
    again = [*USER, whole.choices[0].message.model_dump(), {"role": "user", "content": "More."}]
    assert client.chat.completions.create(messages=again, **options).choices[0].message.content is not None


def test_json_answers(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 300, "seed": 5}
    choices = (
        client.chat.completions.create(response_format={"type": "json_object"}, **{**options, "seed": seed}).choices[0]
        for seed in range(20)
    )
    finished = next(choice for choice in choices if choice.finish_reason == "stop")
    assert isinstance(json.loads(finished.message.content), dict)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(response_format=wanted, **options)
    assert answer.choices[0].finish_reason == "stop" and isinstance(
        json.loads(answer.choices[0].message.content)["ok"], bool
    )
    chosen = client.chat.completions.create(
        extra_body={"response_format": {"type": "regex", "grammar": "(yes|no)"}}, **options
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    bounded = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"$ref": "http://evil.example/s.json"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(response_format=bounded, **options)


def test_tools(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [CHAT_TOOL], "max_tokens": 60, "seed": 1}
    for choice in ("required", {"type": "function", "function": {"name": "switch"}}):
        answer = valid(client.chat.completions.create(tool_choice=choice, **options)).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "switch" and isinstance(json.loads(call.function.arguments)["on"], bool)
        names, arguments, reasons = "", "", []
        for chunk in map(valid, client.chat.completions.create(tool_choice=choice, stream=True, **options)):
            for part in chunk.choices[0].delta.tool_calls or ():
                names += (part.function.name or "") if part.function else ""
                arguments += (part.function.arguments or "") if part.function else ""
            reasons.append(chunk.choices[0].finish_reason)
        assert names == "switch" and arguments == call.function.arguments and reasons[-1] == "tool_calls"
    none = client.chat.completions.create(tool_choice="none", **options).choices[0]
    assert none.message.tool_calls is None
    again = [*USER, answer.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert (
        client.chat.completions.create(model="tiny", messages=again, max_tokens=3).choices[0].message.content
        is not None
    )
