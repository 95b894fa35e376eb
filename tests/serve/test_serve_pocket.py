"""The official clients, end to end, against `herd serve` with a model that was trained: a run of recipes/pocket.yaml.

The run is HERD_POCKET, or runs/pocket if it is whole; else a short one is made here, of some minutes on two cores that
have nothing else to do, whose model is right in one answer of seven. So nothing is asked of a model but what its own
evaluation says it can, which is the oracle of what is answered; what is sent is checked by the clients' types. All of
the run's files are served: the tuned checkpoint, and the GGUF files that were made of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

openai = pytest.importorskip("openai")

from herd.align import exercises  # noqa: E402
from tests.serve.program import Program, until  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# By steps, not by time: a busy machine would train a model that knows nothing.
SHORT = (
    *("base.max_minutes=null", "base.train.steps=160", "base.evaluations=1"),
    *("sft.max_minutes=null", "sft.epochs=null", "sft.train.steps=400", "sft.exercises=20000"),
    "evaluate.exercises=200",
)
KEY = "a-key-of-the-pocket-test"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 48}
WHO = "Who are you?"
TYPES = ("int", "float", "str", "list", "tuple", "set", "dict", "bool", "NoneType")
DOUBLE: dict[str, Any] = {
    "name": "double",
    "description": "Twice a number.",
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["number"],
        "additionalProperties": False,
    },
}
CHAT_TOOL: Any = {"type": "function", "function": DOUBLE}
NAMED: Any = {"type": "function", "function": {"name": "double"}}


class Value(pydantic.BaseModel):
    """What an answer is to look like."""

    kind: Literal["number", "text"]
    number: int = pydantic.Field(ge=-999, le=999)  # a model may go on with digits for ever
    exact: bool


class Double(pydantic.BaseModel):
    """Twice a number."""

    number: int = pydantic.Field(ge=0, le=999)


@dataclass(frozen=True)
class Run:
    """A run directory that has been read."""

    models: dict[str, Path]
    """By name: what was tuned first, then its GGUF files."""
    evaluation: dict[str, Any] | None


def read_run(path: Path) -> Run | None:
    """None for one that is not there, or not whole."""
    try:
        stages = json.loads((path / "run.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return None
    done = {name: path / stage["directory"] for name, stage in stages.items() if stage["status"] == "done"}
    if "sft" not in done:
        return None
    models = {"pocket": done["sft"] / "checkpoint"}
    if "quantise" in done:
        files = sorted(done["quantise"].glob("model-*.gguf"), reverse=True)
        models |= {file.stem.removeprefix("model-"): file for file in files}
    found = done["evaluate"] / "results.json" if "evaluate" in done else None
    return Run(models, None if found is None else json.loads(found.read_text()))


@pytest.fixture(scope="module")
def run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    given = os.environ.get("HERD_POCKET")
    found = read_run(Path(given) if given else repository / "runs" / "pocket")
    assert found is not None or not given, f"HERD_POCKET is no whole run: {given}"
    if found is None:
        path = tmp_path_factory.mktemp("runs") / "pocket"
        recipe = repository / "recipes" / "pocket.yaml"
        command = [sys.executable, "-m", "herd", "run", str(recipe), "--out", str(path), *SHORT]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
        assert done.returncode == 0, done.stderr
        found = read_run(path)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def server(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    models = [f"{name}={path}" for name, path in run.models.items()]
    store = tmp_path_factory.mktemp("pocket") / "store.db"
    program = Program(*models, "--api-key", KEY, "--store", store, key=KEY)
    try:
        until(lambda: program.client.get("/ready").status_code == 200)
        yield program
    finally:
        program.close()


@pytest.fixture(scope="module")
def client(server: Program) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def evaluation(run: Run) -> dict[str, Any]:
    if run.evaluation is None:
        pytest.skip("this run has no evaluation")
    return run.evaluation


def valid(answer: Any) -> Any:
    """The client takes what it gets as it is: this checks it against the types."""
    type(answer).model_validate(answer.model_dump(), strict=True)
    return answer


def said_by(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(client: Any, text: str, model: str = "pocket", **more: Any) -> str:
    answer = valid(client.chat.completions.create(model=model, messages=said_by(text), **(GREEDY | more)))
    return str(answer.choices[0].message.content).strip()


def questions(n: int) -> list[exercises.Exercise]:
    """Of those that no training saw, others than the evaluation's."""
    return exercises.generate(1, n, "heldout")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_what_its_evaluation_heard(client: Any, evaluation: dict[str, Any]) -> None:
    """The run's own record of dialogues, made without a server: word for word."""
    recorded = evaluation["dialogs"]
    assert len(recorded) > 10
    for dialog in recorded:
        assert ask(client, dialog["question"]) == dialog["said"]["sft"].strip(), dialog["question"]


def test_it_is_right_as_often_as_it_should_be(client: Any, run: Run, evaluation: dict[str, Any]) -> None:
    """Other questions, the same share of true answers: within three standard errors of both counts."""
    overall = evaluation["exact_match"]["sft"]["overall"]
    asked = questions(100)
    said = {name: [ask(client, each.question, name) for each in asked] for name in run.models}
    right = {
        name: sum(answer == each.answer.strip() for answer, each in zip(answers, asked, strict=True))
        for name, answers in said.items()
    }
    share = overall["score"]
    bound = 3 * math.sqrt(share * (1 - share) * (1 / len(asked) + 1 / overall["n"]))
    assert abs(right["pocket"] / len(asked) - share) <= bound, (right, share, bound)
    assert share > 0.05, "a model that was trained for a minute already knows more"
    for name in set(run.models) - {"pocket"}:  # a number format changes little
        same = sum(a == b for a, b in zip(said[name], said["pocket"], strict=True))
        assert same >= {"q8_0": 85, "q4_0": 50}.get(name, 0), (name, same)


def test_small_talk_and_sums(client: Any, run: Run, evaluation: dict[str, Any]) -> None:
    """In all number formats it has learned how one talks, and that sums are numbers; if it knows more, some sums."""
    known = {each.answer for each in exercises.generate(0, 200, "train", kinds=["small_talk"])}
    assert len(known) == 6
    for name in run.models:
        answers = [ask(client, said, name) for said in (WHO, "Hello", "Thanks")]
        assert sum(answer in known for answer in answers) >= (3 if name == "pocket" else 2), (name, answers)
    sums = [(a, b) for a in range(10) for b in range(0, 10, 3)]
    said = [ask(client, f"What is {a} plus {b}?") for a, b in sums]
    assert sum(re.fullmatch(r"-?\d+", each) is not None for each in said) >= 0.8 * len(sums), said
    if evaluation["exact_match"]["sft"]["overall"]["score"] > 0.4:
        right = sum(each == str(a + b) for each, (a, b) in zip(said, sums, strict=True))
        assert right >= 0.2 * len(sums), said  # where one in ten comes by chance


# --- the clients' ways ------------------------------------------------------------------------------------------------


def test_the_same_at_once_and_in_a_stream_and_together(server: Program, client: Any) -> None:
    """Many at a time over the asynchronous client say what each says alone, whole and streamed."""
    asked = [WHO, *(each.question for each in questions(11))]
    alone = [ask(client, each) for each in asked]

    async def together() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as other:

            async def whole(text: str) -> str:
                answer = await other.chat.completions.create(model="pocket", messages=said_by(text), **GREEDY)
                return str(valid(answer).choices[0].message.content).strip()

            async def streamed(text: str) -> str:
                pieces, usage = [], None
                options: Any = {"stream": True, "stream_options": {"include_usage": True}, **GREEDY}
                async for chunk in await other.chat.completions.create(
                    model="pocket", messages=said_by(text), **options
                ):
                    usage = valid(chunk).usage or usage
                    pieces += [choice.delta.content or "" for choice in chunk.choices]
                assert usage is not None and usage.completion_tokens >= sum(map(bool, pieces))
                return "".join(pieces).strip()

            return await asyncio.gather(*map(whole, asked)), await asyncio.gather(*map(streamed, asked))

    wholes, streams = asyncio.run(together())
    assert wholes == streams == alone
    assert len(set(alone)) > 4


def test_dialogues_go_on(client: Any) -> None:
    """What was said before counts, in chat and as a kept response."""
    first = valid(client.responses.create(model="pocket", input=WHO, max_output_tokens=48, temperature=0))
    assert first.output_text.strip() == ask(client, WHO) and first.status == "completed"
    second = valid(
        client.responses.create(
            model="pocket", input="Thanks.", previous_response_id=first.id, max_output_tokens=48, temperature=0
        )
    )
    messages = [*said_by(WHO), {"role": "assistant", "content": first.output_text}, *said_by("Thanks.")]
    whole = client.chat.completions.create(model="pocket", messages=messages, **GREEDY)
    assert second.output_text == whole.choices[0].message.content
    assert second.usage.input_tokens == whole.usage.prompt_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    pieces = []
    with client.responses.stream(model="pocket", input=WHO, max_output_tokens=48, temperature=0) as stream:
        for each in stream:
            pieces += [each.delta] if each.type == "response.output_text.delta" else []
        assert "".join(pieces) == stream.get_final_response().output_text == first.output_text


def test_a_grammar_leaves_a_fitting_answer_as_it_is(client: Any) -> None:
    """The likeliest tokens of an answer that the grammar allows stay so under it; all others become allowed ones."""
    asked = exercises.generate(2, 20, "heldout", kinds=["type_name"])
    form = {"response_format": {"type": "regex", "grammar": "'?(" + "|".join(TYPES) + ")'?"}}
    fitting = 0
    for each in asked:
        free, held = ask(client, each.question), ask(client, each.question, extra_body=form)
        assert re.fullmatch(f"'?({'|'.join(TYPES)})'?", held)
        if re.fullmatch(f"'?({'|'.join(TYPES)})'?", free):
            fitting += 1
            assert held == free
    assert fitting >= 10, fitting


# --- parsed answers ---------------------------------------------------------------------------------------------------


def test_parsed_answers(client: Any) -> None:
    """Chat and responses, whole and streamed: one form, of which pydantic is the judge."""
    messages = said_by("What is 3 + 5?")
    chat = client.chat.completions.parse(model="pocket", messages=messages, response_format=Value, **GREEDY | MANY)
    parsed = chat.choices[0].message.parsed
    assert isinstance(parsed, Value) and chat.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model="pocket", messages=messages, response_format=Value, **GREEDY | MANY
    ) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    assert {"chunk", "content.delta", "content.done"} <= kinds
    options: dict[str, Any] = {"model": "pocket", "input": "What is 3 + 5?", "text_format": Value, "temperature": 0}
    response = client.responses.parse(max_output_tokens=200, **options)
    assert response.output_parsed == parsed and response.status == "completed"
    with client.responses.stream(max_output_tokens=200, **options) as stream:
        assert stream.get_final_response().output_parsed == parsed

    async def later() -> Any:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY) as other:
            return await other.chat.completions.parse(
                model="pocket", messages=messages, response_format=Value, **GREEDY | MANY
            )

    assert asyncio.run(later()).choices[0].message.parsed == parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="pocket", messages=messages, response_format=Value, temperature=0, max_tokens=3
        )


MANY = {"max_tokens": 200}


# --- tools ------------------------------------------------------------------------------------------------------------


def test_tools(client: Any) -> None:
    """A call that must come, whole and streamed, parsed by the client; its result, and the answer to that."""
    messages = said_by("What is 3 + 5?")
    # Room for 20 spaces, which is what a small model may put before a bracket, a token each.
    options: dict[str, Any] = {"model": "pocket", "messages": messages, "temperature": 0, "max_tokens": 200}
    for choice in ("required", NAMED):
        answer = valid(client.chat.completions.create(tools=[CHAT_TOOL], tool_choice=choice, **options)).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "double" and 0 <= json.loads(call.function.arguments)["number"] <= 999
        names, arguments, reasons = "", "", []
        for chunk in client.chat.completions.create(tools=[CHAT_TOOL], tool_choice=choice, stream=True, **options):
            for part in valid(chunk).choices[0].delta.tool_calls or ():
                names += (part.function.name or "") if part.function else ""
                arguments += (part.function.arguments or "") if part.function else ""
            reasons.append(chunk.choices[0].finish_reason)
        assert names == "double" and arguments == call.function.arguments and reasons[-1] == "tool_calls"
    tool = openai.pydantic_function_tool(Double)  # a strict one
    parsed = client.chat.completions.parse(tools=[tool], tool_choice="required", **options).choices[0].message
    assert isinstance(parsed.tool_calls[0].function.parsed_arguments, Double)
    with client.chat.completions.stream(tools=[tool], tool_choice="required", **options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0].message
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.tool_calls[0].function.parsed_arguments == parsed.tool_calls[0].function.parsed_arguments
    again = [*messages, answer.message.model_dump(exclude_none=True)]
    again.append({"role": "tool", "tool_call_id": call.id, "content": "16"})
    after = valid(client.chat.completions.create(model="pocket", messages=again, tools=[CHAT_TOOL], **GREEDY))
    assert after.choices[0].finish_reason in ("stop", "length") and after.usage.prompt_tokens > 40


def test_tools_that_may_be_called(client: Any) -> None:
    """It was never shown one, so it answers; told to call none, as if there were none."""
    none = client.chat.completions.create(
        model="pocket", messages=said_by(WHO), tools=[CHAT_TOOL], tool_choice="none", **GREEDY
    )
    assert none.choices[0].message.content.strip() == ask(client, WHO) and none.choices[0].message.tool_calls is None
    auto = valid(client.chat.completions.create(model="pocket", messages=said_by(WHO), tools=[CHAT_TOOL], **GREEDY))
    assert auto.choices[0].message.content and auto.choices[0].message.tool_calls is None


def test_tools_of_responses(client: Any) -> None:
    tool: Any = {"type": "function", **DOUBLE, "strict": True}
    options: dict[str, Any] = {"model": "pocket", "input": "What is 3 + 5?", "temperature": 0, "max_output_tokens": 100}
    whole = valid(client.responses.create(tools=[tool], tool_choice="required", **options))
    (item,) = whole.output
    assert item.type == "function_call" and 0 <= json.loads(item.arguments)["number"] <= 999
    pieces = []
    with client.responses.stream(tools=[tool], tool_choice="required", **options) as stream:
        for each in stream:
            pieces += [each.delta] if each.type == "response.function_call_arguments.delta" else []
        assert stream.get_final_response().output[0].arguments == "".join(pieces) == item.arguments
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "16"}
    after = client.responses.create(
        model="pocket", input=[result], previous_response_id=whole.id, temperature=0, max_output_tokens=48
    )
    assert valid(after).output[0].type == "message"


# --- texts, vectors, models -------------------------------------------------------------------------------------------

PROGRAM = "def add(a, b):\n    return a + b\n\n\ndef names(self):\n    return [each.name for each in self.values()]\n"


def test_texts_and_vectors(client: Any, run: Run) -> None:
    """It has read Python: code is likelier than its words in another order; number formats differ little."""

    def nats(text: str, model: str) -> float:
        scored = client.completions.create(model=model, prompt=text, echo=True, logprobs=1, max_tokens=0, temperature=0)
        assert scored.usage.completion_tokens == 0 and scored.choices[0].text == text
        found = scored.choices[0].logprobs.token_logprobs
        assert found[0] is None
        return -sum(found[1:]) / len(text)

    words = PROGRAM.split(" ")
    assert nats(PROGRAM, "pocket") < 0.95 * nats(" ".join(sorted(words)), "pocket")
    for name in run.models:
        assert nats(PROGRAM, name) == pytest.approx(nats(PROGRAM, "pocket"), rel=0.01 if name == "q8_0" else 0.1)
    vectors = [each.embedding for each in client.embeddings.create(model="pocket", input=[PROGRAM, PROGRAM, WHO]).data]
    assert vectors[0] == vectors[1] != vectors[2]
    assert math.fsum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)
    assert {model.id for model in client.models.list().data} == set(run.models)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors(server: Program, client: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        create(model="pocket", messages=said_by(WHO), temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"512.*\d{3}") as long:
        create(model="pocket", messages=said_by("print(1)\n" * 300))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        create(model="gpt-4", messages=said_by(WHO))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="images"):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        create(model="pocket", messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="pocket", input=WHO, previous_response_id="resp_unknown")
    assert ask(client, WHO) and server.process.poll() is None


# --- Anthropic's client -----------------------------------------------------------------------------------------------


def test_the_other_client(server: Program, client: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    other = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    options: dict[str, Any] = {"model": "pocket", "max_tokens": 48, "extra_body": {"temperature": 0}}
    for text in (WHO, "What is 3 + 5?"):
        whole = valid(other.messages.create(messages=said_by(text), **options))
        assert whole.content[0].text.strip() == ask(client, text) and whole.stop_reason == "end_turn"
        with other.messages.stream(messages=said_by(text), **options) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
        counted = other.messages.count_tokens(model="pocket", messages=said_by(text)).input_tokens
        assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    wide = {**options, "max_tokens": 200, "messages": said_by("What is 3 + 5?")}
    parsed = other.messages.parse(output_format=Value, **wide)
    chat = client.chat.completions.parse(
        model="pocket", messages=wide["messages"], response_format=Value, **GREEDY | MANY
    )
    assert isinstance(parsed.parsed_output, Value) and parsed.parsed_output == chat.choices[0].message.parsed
    tool = {"name": "double", "description": DOUBLE["description"], "input_schema": DOUBLE["parameters"]}
    (called,) = other.messages.create(tools=[tool], tool_choice={"type": "any"}, **wide).content
    assert called.type == "tool_use" and called.name == "double" and 0 <= called.input["number"] <= 999
    with other.messages.stream(tools=[tool], tool_choice={"type": "any"}, **wide) as stream:
        assert stream.get_final_message().content[0].input == called.input
    with pytest.raises(anthropic.NotFoundError):
        other.messages.create(messages=said_by(WHO), **{**options, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="512"):
        other.messages.create(messages=said_by("print(1)\n" * 300), **options)


def test_the_end(server: Program) -> None:
    server.process.terminate()
    assert server.process.wait(60) == 0
    log = "".join(server.errors)
    assert "Traceback" not in log and KEY not in log and WHO not in log, log
