"""What other tools make of the files we write: transformers' ids, its chat template, the gguf package's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import tokenizer
from herd.tokenizer import CHAT_FORMATS, Message
from herd.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TURNS: list[Message] = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!  🦙\nTwo lines.\n"},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
]
SYSTEM: Message = {"role": "system", "content": "Be brief. "}
TOOL: Message = {"role": "tool", "content": "a tool's answer"}


def test_transformers_gives_equal_ids(
    saved_tokenizer: Tokenizer, saved: Callable[[Tokenizer], Path], texts: list[str]
) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(saved(saved_tokenizer))
    assert len(theirs) == saved_tokenizer.vocab_size
    assert theirs.bos_token_id == saved_tokenizer.bos_id and theirs.eos_token_id == saved_tokenizer.eos_id
    assert theirs.pad_token_id == saved_tokenizer.pad_id
    for text in [*texts, "", " x", "  ", "\n", "a  b   c    d" + " " * 40]:
        ids = saved_tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [saved_tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text
    for name, number in list(saved_tokenizer.specials.items())[:20]:
        assert theirs.convert_tokens_to_ids(name) == number


def test_auto_tokenizer_in_a_models_directory(small_llama3: Tokenizer, small_llama2: Tokenizer, tmp_path: Path) -> None:
    """AutoTokenizer takes the model's type into account, and has its own ideas about Llamas."""
    for ours in (small_llama3, small_llama2):
        ours.save(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in (" x", "a  b", "\n", "def f(x):  # 🦙"):
            assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]


def test_transformers_gives_equal_ids_on_peps(
    real: dict[str, Tokenizer], saved: Callable[[Tokenizer], Path], peps: list[str]
) -> None:
    for name in ("llama2", "llama3"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(saved(real[name]))
        for text in peps[::15]:
            assert theirs.encode(text, add_special_tokens=False) == real[name].encode(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc AB.\n\t 12é🦙▁")))
def test_the_merges_we_list_do_what_our_ranks_do(small_llama3: Tokenizer, small_llama2: Tokenizer, text: str) -> None:
    """Few characters, so that pieces of many equal neighbours come up, where merging by list could go astray."""
    for ours in (small_llama3, small_llama2):
        assert _oracle(ours).encode(text, add_special_tokens=False).ids == ours.encode(text)


def _oracle(ours: Tokenizer) -> object:
    from tokenizers import Tokenizer as Oracle

    from herd.tokenizer.hf_write import tokenizer_json

    if id(ours) not in _ORACLES:
        _ORACLES[id(ours)] = Oracle.from_str(tokenizer_json(ours))
    return _ORACLES[id(ours)]


_ORACLES: dict[int, object] = {}


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_the_template_renders_to_our_ids(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    fixtures = {"llama4": "small_llama4", "codellama-70b": "small_code_llama"}
    fixture = "small_llama3" if name.startswith("llama3") else fixtures.get(name, "small_llama2")
    ours = request.getfixturevalue(fixture).with_chat_format(name)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dialogs = [
        (TURNS, False),
        ([SYSTEM, *TURNS], False),
        (TURNS[:1], True),
        (TURNS[:3], True),
        ([SYSTEM, *TURNS[:3]], True),
    ]
    if ours.chat_format.startswith(("llama3", "llama4")):
        dialogs += [([*TURNS[:1], TOOL], True), ([*TURNS, SYSTEM, TURNS[2]], True)]
    for messages, answer in dialogs:
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        ids = theirs.encode(rendered, add_special_tokens=False)
        assert ids == ours.encode_dialog(messages, add_generation_prompt=answer).ids, rendered
        again = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=True)["input_ids"]
        assert again == ids


@pytest.mark.parametrize("fixture", ["small_llama2", "small_llama3", "small_code_llama"])
def test_the_template_refuses_what_it_cannot_write(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str
) -> None:
    request.getfixturevalue(fixture).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    with pytest.raises(Exception, match=r"without tools|no tools"):
        theirs.apply_chat_template(TURNS, tools=[tool])
    if fixture == "small_llama2":
        with pytest.raises(Exception, match="marks of the format"):
            theirs.apply_chat_template([{"role": "user", "content": "[INST]"}])
        with pytest.raises(Exception, match="alternate"):
            theirs.apply_chat_template(TURNS[1:])


def test_transformers_own_converter_lists_the_same_merges(shared_data: Path, real: dict[str, Tokenizer]) -> None:
    """The 280,147 merges of the released Llama 3 tokenizer.json, as transformers makes them from Meta's file."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from herd.tokenizer.bytechars import merges_of

    file = str(shared_data / "tokenizers" / "llama3.tokenizer.model")
    vocab, merges = TikTokenConverter(file).extract_vocab_merges_from_model(file)
    assert len(merges) == 280_147
    assert merges_of(real["llama3"].vocabulary.ranks) == [" ".join(pair) for pair in merges]
    tokens = real["llama3"].gguf_metadata()["tokenizer.ggml.tokens"]
    assert tokens[:128_000] == sorted(vocab, key=vocab.__getitem__)


def test_the_gguf_keys_are_those_the_gguf_package_knows(small_llama3: Tokenizer, small_llama2: Tokenizer) -> None:
    import gguf

    keys = gguf.constants.Keys.Tokenizer
    known = {value for key, value in vars(keys).items() if not key.startswith("_")}
    for ours in (small_llama3, small_llama2):
        metadata = ours.gguf_metadata()
        assert set(metadata) - known == {"herd.chat_format"}
        types = set(metadata[keys.TOKEN_TYPE])
        assert types <= {int(kind) for kind in gguf.TokenType}
    assert small_llama3.gguf_metadata()[keys.EOT_ID] == small_llama3.specials["<|eot_id|>"]


def test_transformers_reads_the_trained_tokenizer_from_a_gguf_like_ours(
    small_llama3: Tokenizer, tmp_path: Path, texts: list[str]
) -> None:
    """Not through files: the GGUF's tokens and merges make the library's BPE give our ids."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Oracle

    metadata = small_llama3.gguf_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    oracle = Oracle(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(small_llama3.vocabulary.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in texts:
        assert oracle.encode(text).ids == small_llama3.encode(text)
    assert tokenizer.from_gguf_metadata(metadata).encode(texts[0]) == small_llama3.encode(texts[0])
