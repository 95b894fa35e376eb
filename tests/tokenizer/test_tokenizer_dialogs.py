"""Dialogues: the ids of Meta's code, told again here in a few lines, and what no content may change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import HerdError, UsageError
from herd.tokenizer import CHAT_FORMATS, Message
from herd.tokenizer.tokenizer import Tokenizer

SYSTEM: Message = {"role": "system", "content": " Be brief.\n"}
DIALOG: list[Message] = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! 🦙"},
    {"role": "user", "content": " What is\n2+2? "},
    {"role": "assistant", "content": "4"},
]
HEADERS = ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")


def formats_of(tokenizer: Tokenizer) -> list[str]:
    """Every format this vocabulary can write."""
    return [name for name, chat in CHAT_FORMATS.items() if all(x in tokenizer.specials for x in chat.controls)]


@pytest.fixture(params=HEADERS)
def header_tokenizer(request: pytest.FixtureRequest, small_llama3: Tokenizer, small_llama4: Tokenizer) -> Tokenizer:
    base = small_llama4 if request.param == "llama4" else small_llama3
    return base.with_chat_format(request.param)


def meta_header_format(tokenizer: Tokenizer, messages: list[Message], answer: bool) -> list[int]:
    """`ChatFormat.encode_dialog_prompt` of meta-llama/llama3 and llama-models."""
    four = tokenizer.chat_format == "llama4"
    start, end, eot = (
        ("<|header_start|>", "<|header_end|>", "<|eot|>")
        if four
        else ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    ids = [tokenizer.specials["<|begin_of_text|>"]]
    for message in [*messages, {"role": "assistant"}] if answer else messages:
        ids += [tokenizer.specials[start], *tokenizer.encode(message["role"]), tokenizer.specials[end]]
        ids += tokenizer.encode("\n\n")
        if "content" in message:
            content = message["content"].strip() if tokenizer.chat_format == "llama3" else message["content"]
            ids += [*tokenizer.encode(content), tokenizer.specials[eot]]
    return ids


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_header_formats_are_metas(header_tokenizer: Tokenizer, system: list[Message], answer: bool) -> None:
    messages = [*system, *DIALOG[:3]] if answer else [*system, *DIALOG]
    encoded = header_tokenizer.encode_dialog(messages, add_generation_prompt=answer)
    assert encoded.ids == meta_header_format(header_tokenizer, messages, answer)


def test_the_example_of_the_prompt_format_document(real: dict[str, Tokenizer]) -> None:
    """models/llama3_3/prompt_format.md, "User and assistant conversation", with its special tokens looked up."""
    messages: list[Message] = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Answer who are you in the form of jeopardy?"},
    ]
    ids = real["llama3"].encode_dialog(messages, add_generation_prompt=True).ids
    assert real["llama3"].decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnswer who are you in the form of jeopardy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # the ids of Meta's own test, models/llama3/tests/api/test_tokenizer.py
    messages = [{"role": "system", "content": "This is a test sentence."}]
    expected = [128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009]
    assert real["llama3"].encode_dialog(messages).ids == expected
    ids = real["llama4"].encode_dialog(messages, add_generation_prompt=True).ids
    assert ids[:3] == [200000, 200005, 15651] and ids[-4:] == [200005, 140680, 200006, 368]


def meta_llama2(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """`Llama.chat_completion` of meta-llama/llama; a last answer is encoded as the ones before."""
    if messages[0]["role"] == "system":
        first = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": first}, *messages[2:]]
    ids = []
    for prompt, answer in zip(messages[::2], messages[1::2], strict=False):
        text = f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} "
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    if messages[-1]["role"] == "user":
        ids += [tokenizer.bos_id, *tokenizer.encode(f"[INST] {messages[-1]['content'].strip()} [/INST]")]
    return ids


CONTENT = st.text(st.sampled_from("ab Z19.\n\t▁☺🦙[]/<>"), max_size=25)


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_llama2_is_metas(small_llama2: Tokenizer, contents: list[str]) -> None:
    """Answers are encoded apart from instructions here and together there; the ids are the same."""
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    assert small_llama2.encode_dialog(messages).ids == meta_llama2(small_llama2, messages)


def test_llama2_is_metas_with_the_released_vocabulary(real: dict[str, Tokenizer], texts: list[str]) -> None:
    for content in (text[i : i + 200] for text in texts for i in range(0, len(text), 1500)):
        messages: list[Message] = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        if any(tag in content for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")):
            continue
        assert real["llama2"].encode_dialog(messages).ids == meta_llama2(real["llama2"], messages)


def meta_code_llama_70b(tokenizer: Tokenizer, messages: list[Message], answer: bool) -> list[int]:
    """`dialog_prompt_tokens` of meta-llama/codellama."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    ids = [tokenizer.bos_id]
    for message in messages:
        head = f" Source: {message['role']}"
        if message["role"] == "assistant":
            head += "\nDestination: user"
        ids += tokenizer.encode(head)
        if message["content"]:
            ids += tokenizer.encode("\n\n " + message["content"].strip())
        ids += [tokenizer.specials["<step>"]]
    if answer:
        ids += [*tokenizer.encode(" Source: assistant\nDestination: user"), *tokenizer.encode("\n\n ")]
    return ids


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6), system=st.booleans())
def test_code_llama_70b_is_metas(small_code_llama: Tokenizer, contents: list[str], system: bool) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages = messages if system else messages[1:]
    answer = messages[-1]["role"] == "user"
    ids = small_code_llama.encode_dialog(messages, add_generation_prompt=answer).ids
    assert ids == meta_code_llama_70b(small_code_llama, messages, answer)


def test_supervised_are_the_assistants_words_and_ends(any_tokenizer: Tokenizer) -> None:
    for name in formats_of(any_tokenizer):
        tokenizer = any_tokenizer.with_chat_format(name)
        ids, supervised = tokenizer.encode_dialog([SYSTEM, *DIALOG], add_generation_prompt=False)
        assert len(ids) == len(supervised)
        spans: list[list[int]] = []
        for i, (token, own) in enumerate(zip(ids, supervised, strict=True)):
            if own:
                spans = [*spans, []] if i == 0 or not supervised[i - 1] else spans
                spans[-1].append(token)
        assert len(spans) == 2
        for span, content in zip(spans, ("Hello! 🦙", "4"), strict=True):
            assert span[-1] in tokenizer.stop_ids
            assert tokenizer.decode(span[:-1]).strip() == content


def test_generation_prompt_is_what_precedes_an_answer(any_tokenizer: Tokenizer) -> None:
    """A prompt and its answer, put together, are the dialogue that training sees."""
    for name in formats_of(any_tokenizer):
        tokenizer = any_tokenizer.with_chat_format(name)
        prompt = tokenizer.encode_dialog(DIALOG[:3], add_generation_prompt=True)
        whole = tokenizer.encode_dialog(DIALOG)
        assert not any(prompt.supervised[len(tokenizer.encode_dialog(DIALOG[:2]).ids) :])
        if tokenizer.chat_format == "codellama-70b":
            # Meta's prompt ends with the space that its history joins to the answer's first word
            prompt = prompt._replace(ids=prompt.ids[:-1])
        assert whole.ids[: len(prompt.ids)] == prompt.ids


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


def hostile(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Text with control tokens' names in it, whole, doubled and in halves, among ordinary characters."""
    names = [name for name in tokenizer.specials if "reserved" not in name] or list(tokenizer.specials)
    halves = [half for name in names for half in (name[: len(name) // 2], name[len(name) // 2 :])]
    pieces = st.one_of(st.sampled_from(names), st.sampled_from(halves), st.text(max_size=5))
    return st.lists(pieces, max_size=6).map("".join)


def check_structure(tokenizer: Tokenizer, messages: list[Message]) -> None:
    """Control ids stand where the format puts them for harmless content, whatever the content is."""
    control = frozenset(tokenizer.specials.values())
    encoded = tokenizer.encode_dialog(messages)
    harmless = tokenizer.encode_dialog([{**message, "content": "x"} for message in messages])
    assert [i for i in encoded.ids if i in control] == [i for i in harmless.ids if i in control]
    assert sum(message["role"] == "assistant" for message in messages) == sum(
        i in tokenizer.stop_ids for i, own in zip(*encoded, strict=True) if own
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_content_becomes_control_with_headers(
    small_llama3: Tokenizer, small_llama4: Tokenizer, data: st.DataObject
) -> None:
    base = data.draw(st.sampled_from([small_llama3, small_llama4]))
    tokenizer = base.with_chat_format(data.draw(st.sampled_from(formats_of(base))))
    messages: list[Message] = [
        {"role": role, "content": data.draw(hostile(tokenizer))} for role in data.draw(st.lists(ROLES, min_size=1))
    ]
    check_structure(tokenizer, messages)
    ids = tokenizer.encode_dialog(messages, add_generation_prompt=data.draw(st.booleans())).ids
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_content_becomes_control_in_text_formats(
    small_llama2: Tokenizer, small_code_llama: Tokenizer, data: st.DataObject
) -> None:
    """Llama 2 begins each exchange with a beginning of text: one for each of the user's messages."""
    tokenizer = data.draw(st.sampled_from([small_llama2, small_code_llama]))
    n_turns = data.draw(st.integers(1, 4))
    roles = [*data.draw(st.sampled_from([[], ["system"]])), *["user", "assistant"] * n_turns][: n_turns + 1]
    if roles[-1] == "system":
        roles.append("user")
    messages: list[Message] = [{"role": role, "content": data.draw(hostile(tokenizer))} for role in roles]
    try:
        check_structure(tokenizer, messages)
    except UsageError as error:
        assert "holds a mark of the" in str(error)
        assert any(tag in m["content"] for m in messages for tag in ("[INST]", "[/INST]", "SYS>>", "<step>"))
        return
    n_bos = 1 if tokenizer.chat_format == "codellama-70b" else roles.count("user")
    assert tokenizer.encode_dialog(messages).ids.count(tokenizer.bos_id) == n_bos


def test_every_special_token_in_every_place(any_tokenizer: Tokenizer) -> None:
    """Not sampled: each control token's name, alone and amid text, as content of each message of a dialogue.

    Of the hundreds of reserved tokens, the first and the last go one by one, and all of them in one text.
    """
    control = frozenset(any_tokenizer.specials.values())
    joined = " ".join(any_tokenizer.specials)
    assert control.isdisjoint(any_tokenizer.encode(joined))
    tool: list[Message] = [{"role": "tool", "content": "x"}] if any_tokenizer.chat_format in HEADERS else []
    dialog: list[Message] = [SYSTEM, *DIALOG, *tool]
    refused = {"<step>"} if any_tokenizer.chat_format == "codellama-70b" else set()  # its mark, refused below
    assert all(control.isdisjoint(any_tokenizer.encode(name)) for name in any_tokenizer.specials)
    reserved = [name for name in any_tokenizer.specials if "reserved" in name]
    named = [name for name in any_tokenizer.specials if "reserved" not in name]
    for name in [*named, *reserved[:1], *reserved[-1:], joined]:
        for place, message in enumerate(dialog):
            for content in (name, f"a{name}b"):
                changed = [*dialog[:place], {**message, "content": content}, *dialog[place + 1 :]]
                if any(mark in name for mark in refused):
                    with pytest.raises(UsageError, match="holds a mark"):
                        any_tokenizer.encode_dialog(changed)
                else:
                    check_structure(any_tokenizer, changed)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_text_marks_in_content_are_refused(
    small_llama2: Tokenizer, small_code_llama: Tokenizer, tag: str, position: int
) -> None:
    messages: list[Message] = [SYSTEM, *DIALOG[:2]]
    messages[position] = {**messages[position], "content": f"a {tag} b"}
    for tokenizer in (small_llama2, small_code_llama):
        with pytest.raises(UsageError, match=rf"messages\[{position}\] holds a mark"):
            tokenizer.encode_dialog(messages)
    code = small_llama2.with_chat_format("codellama")
    with pytest.raises(UsageError, match="<step>"):
        code.encode_dialog([{"role": "user", "content": "<step>"}])


BAD_MESSAGES: list[tuple[object, str]] = [
    ([], "at least one message"),
    ("hello", "at least one message"),
    ({"role": "user", "content": "x"}, "at least one message"),
    (["hello"], r"messages\[0\] is not a message"),
    ([{"content": "x"}], "no known role"),
    ([{"role": "developer", "content": "x"}], "got developer; allowed: system, user, assistant, tool"),
    ([{"role": "user"}], "no text as content"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "no text as content"),
    ([{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}], "only the assistant calls tools"),
    (5, "at least one message"),
    ([{"role": "assistant", "content": "", "tool_calls": 5}], "tool_calls is not a list"),
    ([{"role": "assistant", "content": "", "tool_calls": {"name": "f"}}], "tool_calls is not a list"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "9" * 5000}]}], "is not JSON"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}], "is not JSON"),
    ([{"role": "assistant", "tool_calls": [{}]}], "names no function"),
    ([{"role": "assistant", "tool_calls": ["f"]}], "names no function"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "is not JSON"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "is not an object"),
]


@pytest.mark.parametrize(("messages", "error"), BAD_MESSAGES)
def test_bad_messages_are_named(small_llama3: Tokenizer, messages: list[Message], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        small_llama3.encode_dialog(messages)


@pytest.mark.parametrize("fixture", ["small_llama2", "small_code_llama"])
def test_roles_that_text_formats_cannot_hold(request: pytest.FixtureRequest, fixture: str) -> None:
    tokenizer = request.getfixturevalue(fixture)
    for messages in ([SYSTEM], DIALOG[1:], [DIALOG[0], DIALOG[0]], [DIALOG[0], SYSTEM]):
        with pytest.raises(UsageError, match="user and assistant by turns"):
            tokenizer.encode_dialog(messages)
    with pytest.raises(UsageError, match="an answer follows a user's message"):
        tokenizer.encode_dialog(DIALOG, add_generation_prompt=True)
    with pytest.raises(UsageError, match="knows no tools"):
        tokenizer.encode_dialog(DIALOG, tools=["brave_search"])


def test_code_llamas_infilling(small_code_llama: Tokenizer, small_llama2: Tokenizer) -> None:
    """`infilling_prompt_tokens` of meta-llama/codellama; its smiley trick and ours give the same ids."""
    t = small_code_llama
    pre, mid, suf = (t.specials[name] for name in ("▁<PRE>", "▁<MID>", "▁<SUF>"))
    for prefix, suffix in (("def f(x):\n  ", "\n  return y"), (" a", " b"), ("a", "")):
        smiley = len(t.encode("☺"))
        after = t.encode("☺" + suffix)[smiley:]
        psm = [t.bos_id, pre, *t.encode(prefix), suf, *after, mid]
        spm = [t.bos_id, pre, suf, *after, mid, *t.encode(prefix)]
        assert t.encode_infill(prefix, suffix) == psm
        assert t.encode_infill(prefix, suffix, suffix_first=True) == spm
    assert t.specials["▁<EOT>"] in t.stop_ids and t.specials["<step>"] in t.stop_ids
    with pytest.raises(HerdError, match="no marks for infilling"):
        small_llama2.encode_infill("a", "b")
