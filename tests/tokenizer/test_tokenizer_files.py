"""Finding, reading and refusing tokenizer files."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import tokenizer
from herd.errors import FileFormatError, HerdError, UsageError
from herd.tokenizer.spmodel import Piece, PieceType, write_model
from herd.tokenizer.tokenizer import Tokenizer


def write_gguf(path: Path, metadata: dict[str, object]) -> Path:
    """A GGUF made by the gguf package from `gguf_metadata()`, with the types llama.cpp's converter uses."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def assert_same(one: Tokenizer, other: Tokenizer, texts: list[str]) -> None:
    assert one.specials == other.specials and one.vocab_size == other.vocab_size
    assert (one.chat_format, one.chat_template) == (other.chat_format, other.chat_template)
    assert (one.bos_id, one.eos_id, one.pad_id, one.stop_ids) == (
        other.bos_id,
        other.eos_id,
        other.pad_id,
        other.stop_ids,
    )
    assert list(one.vocabulary.table) == list(other.vocabulary.table)
    for text in texts:
        assert one.encode(text) == other.encode(text)


def test_saved_files_load_as_they_were(
    saved_tokenizer: Tokenizer, saved: Callable[[Tokenizer], Path], texts: list[str]
) -> None:
    assert_same(tokenizer.load(saved(saved_tokenizer)), saved_tokenizer, texts)


def test_gguf_round_trip(saved_tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "vocabulary.gguf", saved_tokenizer.gguf_metadata())
    assert_same(tokenizer.load(path), saved_tokenizer, texts)


def test_a_directory_with_one_gguf(small_llama3: Tokenizer, tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", small_llama3.gguf_metadata())
    assert tokenizer.load(tmp_path).vocab_size == 1000
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    with pytest.raises(HerdError, match="no tokenizer in this directory"):
        tokenizer.load(tmp_path)


def test_metas_layout(saved_tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    saved_tokenizer.save(tmp_path, layout="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    # Meta's params.json says how large the vocabulary is where the number of ranks does not
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": saved_tokenizer.vocab_size}))
    if saved_tokenizer.chat_format == "llama4" and saved_tokenizer.vocab_size != 202_048:
        with pytest.raises(FileFormatError, match="vocab_size"):
            tokenizer.load(tmp_path)
        return
    assert_same(tokenizer.load(tmp_path), saved_tokenizer, texts)


@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_the_tiktoken_file_comes_back_byte_for_byte(
    shared_data: Path, real: dict[str, Tokenizer], tmp_path: Path, name: str
) -> None:
    real[name].save(tmp_path, layout="meta")
    released = (shared_data / "tokenizers" / f"{name}.tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.model").read_bytes() == released


def test_byte_level_keeps_metas_file_out_of_the_converters_way(small_llama3: Tokenizer, tmp_path: Path) -> None:
    small_llama3.save(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "original" / "params.json").write_text('{"vocab_size": 1000}')
    assert tokenizer.load(tmp_path).encode("abc def") == small_llama3.encode("abc def")


def test_chat_format_is_kept_asked_for_or_guessed(
    small_llama3: Tokenizer, small_code_llama: Tokenizer, small_llama2: Tokenizer, tmp_path: Path
) -> None:
    assert (small_llama3.chat_format, small_llama2.chat_format) == ("llama3.1", "llama2")
    assert small_code_llama.chat_format == "codellama-70b"
    small_llama3.with_chat_format("llama3.2").save(tmp_path)
    assert tokenizer.load(tmp_path).chat_format == "llama3.2"
    assert tokenizer.load(tmp_path, "llama3.3").chat_format == "llama3.3"
    metadata = small_llama3.with_chat_format("llama3.2").gguf_metadata()
    assert tokenizer.from_gguf_metadata(metadata).chat_format == "llama3.2"
    assert small_llama2.with_chat_format("llama1").chat_format == "llama2"
    assert small_code_llama.with_chat_format("codellama").chat_format == "codellama-70b"
    with pytest.raises(UsageError, match=r"chatml.*allowed: llama1, llama2"):
        small_llama3.with_chat_format("chatml")
    with pytest.raises(UsageError, match="cannot write the chat format llama4"):
        small_llama3.with_chat_format("llama4")


def test_a_template_from_elsewhere_is_kept_word_for_word(small_llama3: Tokenizer, tmp_path: Path) -> None:
    small_llama3.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'theirs' }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = tokenizer.load(tmp_path)
    assert loaded.chat_template == "{{ 'theirs' }}"
    assert tokenizer.from_gguf_metadata(loaded.gguf_metadata()).chat_template == "{{ 'theirs' }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 'newer' }}")
    assert tokenizer.load(tmp_path).chat_template == "{{ 'newer' }}"
    assert loaded.encode_dialog([{"role": "user", "content": "x"}]) == small_llama3.encode_dialog(
        [{"role": "user", "content": "x"}]
    )


def test_paths_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"no such tokenizer file.*nothing.*allowed: tokenizer.json"):
        tokenizer.load(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match="cannot be read"):
        tokenizer.load("x" * 300)
    with pytest.raises(HerdError, match="no tokenizer in this directory"):
        tokenizer.load(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _explode, ("unpickled",)


def _explode(word: str) -> None:
    raise AssertionError(f"the tokenizer file was {word}")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "x.gguf"])
def test_nothing_is_ever_unpickled(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileFormatError):
        tokenizer.load(tmp_path / name)


def lines_of(*tokens: bytes) -> list[bytes]:
    return [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]


BYTES = [bytes([byte]) for byte in range(256)]
BAD_LINES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "not base64": (lambda lines: [*lines[:3], b"I*== 3\n", *lines[4:]], 4),
    "loose base64": (lambda lines: [*lines[:3], b"AA=A 3\n", *lines[4:]], 4),
    "noise in base64": (lambda lines: [*lines[:3], b"A*w== 3\n", *lines[4:]], 4),
    "no padding": (lambda lines: [*lines[:3], b"Aw 3\n", *lines[4:]], 4),
    "no rank": (lambda lines: [*lines[:3], b"Aw==\n", *lines[4:]], 4),
    "rank is text": (lambda lines: [*lines[:3], b"Aw== three\n", *lines[4:]], 4),
    "rank is signed": (lambda lines: [*lines[:3], b"Aw== +3\n", *lines[4:]], 4),
    "three words": (lambda lines: [*lines[:3], b"Aw== 3 3\n", *lines[4:]], 4),
    "rank left out": (lambda lines: [*lines[:3], *lines[4:]], 4),
    "rank twice": (lambda lines: [*lines[:4], *lines[3:]], 5),
    "token twice": (lambda lines: [*lines, base64.b64encode(b"a") + b" 256\n"], 257),
    "empty line": (lambda lines: [*lines[:3], b"\n", *lines[3:]], 4),
    "cut": (lambda lines: [*lines[:-1], b"/w="], 256),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_tiktoken_line_is_named(tmp_path: Path, name: str) -> None:
    change, line = BAD_LINES[name]
    changed = change(lines_of(*BYTES))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(changed))
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(tmp_path / "tokenizer.model")
    assert caught.value.field == f"line {line}"
    assert caught.value.offset == len(b"".join(changed[: line - 1]))


def test_a_tiktoken_file_without_some_byte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines_of(*BYTES[:255])))
    with pytest.raises(FileFormatError, match=r"tokenizer\.model: .*0xff"):
        tokenizer.load(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", b"9" * 5000, "endless number"),
        ("tokenizer_config.json", b"[]", "must be a JSON object"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', "twice"),
        ("original/params.json", b"[]", "must be a JSON object"),
        ("original/params.json", b'{"vocab_size": 270}', "no room for special tokens"),
    ],
)
def test_bad_files_beside_a_vocabulary_are_named(
    small_llama3: Tokenizer, tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    small_llama3.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=match) as caught:
        tokenizer.load(tmp_path / "original" / "tokenizer.model" if "original" in name else tmp_path)
    assert caught.value.file == str(tmp_path / name)


def test_a_template_that_is_no_text_does_not_stop_a_tokenizer(small_llama3: Tokenizer, tmp_path: Path) -> None:
    small_llama3.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ x }}")
    assert tokenizer.load(tmp_path).chat_template == "\ufffd{{ x }}"


@pytest.fixture(scope="module")
def sentencepiece_bytes(small_llama2_file: Path) -> bytes:
    return small_llama2_file.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mutation_of_a_sentencepiece_file_is_read_or_refused(
    sentencepiece_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(sentencepiece_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        # half of the changes go into the last 400 bytes, where the settings are
        first = len(changed) - 400 if data.draw(st.booleans()) else 0
        changed[data.draw(st.integers(first, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.model"
    path.write_bytes(bytes(changed[: data.draw(st.sampled_from([len(changed), 1000, 5000]))]))
    try:
        tokenizer.load(path).encode("some text 123")
    except HerdError as error:
        assert str(error)


def test_every_truncation_of_a_sentencepiece_file_is_refused(sentencepiece_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.model"
    for length in range(1, len(sentencepiece_bytes) - 1, 211):
        path.write_bytes(sentencepiece_bytes[:length])
        with pytest.raises(FileFormatError) as caught:
            tokenizer.load(path)
        assert caught.value.offset is not None and caught.value.offset <= length


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"model_type": "unigram"}, "trainer_spec.model_type"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec.precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "trainer_spec.treat_whitespace_as_suffix"),
    ],
)
def test_sentencepiece_models_of_other_families_are_refused(
    train_sentencepiece: Callable[..., Path], texts: list[str], tmp_path: Path, options: dict[str, object], field: str
) -> None:
    path = train_sentencepiece(texts[:1], tmp_path / "tokenizer.model", **({"vocab_size": 500} | options))
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(path)
    assert caught.value.field == field


def test_sentencepiece_without_byte_pieces_is_refused(
    train_sentencepiece: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    path = train_sentencepiece(texts[:1], tmp_path / "tokenizer.model", vocab_size=400, byte_fallback=False)
    with pytest.raises(HerdError, match="a piece for each of the 256 bytes"):
        tokenizer.load(path)


Change = Callable[[dict[str, Any]], None]


def setting(path: str, value: object) -> Change:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        data[int(last) if isinstance(data, list) else last] = value

    return change


NFKC = {"type": "NFKC"}
BAD_JSON: dict[str, tuple[str, Change, str]] = {
    "unigram": ("small_llama3", setting("model.type", "Unigram"), "model.type"),
    "no vocab": ("small_llama3", setting("model.vocab", []), "vocab"),
    "id is text": ("small_llama3", setting("model.vocab.a", "7"), "model.vocab['a']"),
    "id is true": ("small_llama3", setting("model.vocab.a", True), "model.vocab['a']"),
    "id twice": ("small_llama3", setting("model.vocab.a", 5), "model.vocab"),
    "huge id": ("small_llama3", setting("model.vocab.a", 2**40), "model.vocab"),
    "not byte-level": ("small_llama3", setting("model.vocab.日本", 1000), "model.vocab"),
    "merge of one": ("small_llama3", setting("model.merges.0", "a"), "model.merges[0]"),
    "merge is a number": ("small_llama3", setting("model.merges.0", 5), "model.merges[0]"),
    "endless token": ("small_llama3", setting("model.vocab", {"a" * 5000: 0}), "model.vocab"),
    "normaliser": ("small_llama3", setting("normalizer", NFKC), "normalizer"),
    "other pattern": (
        "small_llama3",
        setting("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"(a+)+$"}),
        "pattern",
    ),
    "removed": ("small_llama3", setting("pre_tokenizer.pretokenizers.0.behavior", "Removed"), "behavior"),
    "prefix space": ("small_llama3", setting("pre_tokenizer.pretokenizers.1.add_prefix_space", True), "ByteLevel"),
    "no split": ("small_llama3", setting("pre_tokenizer", None), "pre_tokenizer"),
    "special elsewhere": ("small_llama3", setting("added_tokens.0.id", 3), "model.vocab"),
    "special surrogate": ("small_llama3", setting("added_tokens.0.content", "\ud800"), "added_tokens[0]"),
    "special without name": ("small_llama3", setting("added_tokens.0.content", None), "added_tokens[0]"),
    "metaspace normaliser": ("small_llama2", setting("normalizer", NFKC), "normalizer"),
    "metaspace id gap": ("small_llama2", setting("model.vocab.▁x", 5000), "model.vocab"),
    "metaspace merge": ("small_llama2", setting("model.merges.0", "qq zz"), "model.merges"),
    "metaspace order": (
        "small_llama2",
        lambda data: data["model"]["merges"].append(data["model"]["merges"][0]),
        "merges",
    ),
    "metaspace short": ("small_llama2", lambda data: data["model"]["merges"].pop(), "model.merges"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_tokenizer_json_that_is_no_llamas_names_the_field(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    fixture, change, field = BAD_JSON[name]
    request.getfixturevalue(fixture).save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(tmp_path)
    assert caught.value.file == str(tmp_path / "tokenizer.json")
    assert caught.value.field is not None and field in caught.value.field


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"model": null}', b"[" * 100_000, b"\xff\xfe", b"null"])
def test_json_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileFormatError):
        tokenizer.load(tmp_path)


def test_metaspace_as_transformers_5_writes_it(small_llama2: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """The ▁ before a text may be a pre-tokenizer's work instead of a normaliser's."""
    small_llama2.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    loaded = tokenizer.load(tmp_path)
    assert all(loaded.encode(text) == small_llama2.encode(text) for text in texts)
    data["pre_tokenizer"]["prepend_scheme"] = "never"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode("x y") == small_llama2.vocabulary.encode_continuation("x y")
    assert loaded.decode(loaded.encode(" x")) == " x"


def test_added_tokens_that_are_no_control_tokens_match_text(small_llama3: Tokenizer, tmp_path: Path) -> None:
    """As in allenai's Llama 2 vocabulary with |||EMAIL_ADDRESS|||: the file says that text holds these tokens."""
    from tokenizers import Tokenizer as Oracle

    small_llama3.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"].append(data["added_tokens"][-1] | {"id": 1000, "content": "|||EMAIL|||", "special": False})
    file.write_text(json.dumps(data))
    loaded = tokenizer.load(tmp_path)
    text = "to |||EMAIL||| and <|eot_id|>"
    assert 1000 in loaded.encode(text) and loaded.specials["<|eot_id|>"] not in loaded.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    oracle = Oracle.from_file(str(file))
    oracle.encode_special_tokens = True
    assert loaded.encode(text) == oracle.encode(text, add_special_tokens=False).ids
    again = tokenizer.from_gguf_metadata(loaded.gguf_metadata())
    assert again.encode(text) == loaded.encode(text)
    loaded.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").encode(text) == loaded.encode(text)


def test_no_flag_of_a_file_makes_content_a_control_token(small_llama3: Tokenizer, tmp_path: Path) -> None:
    """Files in circulation say of some control tokens that text may hold them."""
    text = "".join(small_llama3.specials)
    controls = set(small_llama3.specials.values())
    small_llama3.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    for entry in data["added_tokens"]:
        entry["special"] = False
    file.write_text(json.dumps(data))
    metadata = small_llama3.gguf_metadata()
    kinds = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [4 if i in controls else kind for i, kind in enumerate(kinds)]
    for loaded in (tokenizer.load(tmp_path), tokenizer.from_gguf_metadata(metadata)):
        assert set(loaded.specials.values()) == controls
        assert not controls & set(loaded.encode(text)) and loaded.decode(loaded.encode(text)) == text


def test_llama2_json_with_added_tokens(shared_data: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(shared_data / "tokenizers" / "llama2.tokenizer.json")
    assert loaded.vocab_size == 32_003
    ids = loaded.encode("mail |||EMAIL_ADDRESS||| now")
    assert 32_000 in ids and loaded.decode(ids) == "mail |||EMAIL_ADDRESS||| now"
    loaded.save(tmp_path)
    assert tokenizer.load(tmp_path).encode("mail |||EMAIL_ADDRESS||| now") == ids


def test_code_llamas_marks_can_be_built_from_pieces_but_never_are(small_llama2: Tokenizer, tmp_path: Path) -> None:
    """The released vocabulary has "▁<PRE" as a piece, and its tokenizer.json merges that with ">" to the mark."""
    rows = [(piece.text, piece.score, piece.type) for piece in small_llama2.vocabulary.pieces]
    chain = ["▁<", "▁<P", "▁<PR", "▁<PRE", "▁<PRE>"]
    known = {row[0] for row in rows}
    rows += [(text, -5000.0 - i, PieceType.NORMAL) for i, text in enumerate(chain) if text not in known]
    (tmp_path / "tokenizer.model").write_bytes(write_model([Piece(*row) for row in rows], True))
    loaded = tokenizer.load(tmp_path)
    pre = loaded.specials["▁<PRE>"]
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert pre in raw.encode("x <PRE> y")
    for change in ("", "▁<PRE >"):
        loaded.save(tmp_path)
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        data["model"]["merges"] += [change] if change else []
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        for one in (loaded, tokenizer.load(tmp_path), tokenizer.from_gguf_metadata(loaded.gguf_metadata())):
            assert pre not in one.encode("x <PRE> y") and one.decode(one.encode("x <PRE> y")) == "x <PRE> y"


GGUF_CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "other model": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model"),
    "other pattern": ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre"),
    "no tokens": ({"tokenizer.ggml.tokens": "x"}, "tokenizer.ggml.tokens"),
    "empty tokens": ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
    "numbers as tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    "too few types": ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
    "type 9": ({"tokenizer.ggml.token_type": [9] * 1000}, "tokenizer.ggml.token_type"),
    "merge of one": ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges[0]"),
    "endless token": ({"tokenizer.ggml.tokens": ["a" * 9000]}, "tokenizer.ggml.tokens"),
    "merge not bytes": ({"tokenizer.ggml.merges": ["日 b"]}, "tokenizer.ggml.merges[0]"),
}


@pytest.mark.parametrize("name", GGUF_CHANGES)
def test_gguf_metadata_that_is_no_llamas_names_the_key(small_llama3: Tokenizer, name: str) -> None:
    change, field = GGUF_CHANGES[name]
    with pytest.raises(FileFormatError) as caught:
        tokenizer.from_gguf_metadata(small_llama3.gguf_metadata() | change)
    assert caught.value.field == field


def test_scores_that_a_model_file_cannot_hold_are_refused(small_llama2: Tokenizer) -> None:
    metadata = copy.copy(small_llama2.gguf_metadata())
    for score in (1e300, float("nan"), float("-inf")):  # GGUF has 64-bit floats too
        metadata["tokenizer.ggml.scores"] = [score] * small_llama2.vocab_size
        with pytest.raises(FileFormatError, match="score that is not a number"):
            tokenizer.from_gguf_metadata(metadata)


def test_gguf_without_types_or_scores(small_llama2: Tokenizer) -> None:
    for key in ("tokens", "scores", "token_type"):
        metadata = copy.copy(small_llama2.gguf_metadata())
        del metadata[f"tokenizer.ggml.{key}"]
        with pytest.raises(FileFormatError, match=f"tokenizer.ggml.{key}"):
            tokenizer.from_gguf_metadata(metadata)


def test_a_model_file_beside_a_json_is_not_needed(small_llama2: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    small_llama2.save(tmp_path / "both")
    shutil.copytree(tmp_path / "both", tmp_path / "one")
    (tmp_path / "one" / "tokenizer.model").unlink()
    (tmp_path / "both" / "tokenizer.json").unlink()
    for text in texts:
        assert tokenizer.load(tmp_path / "one").encode(text) == tokenizer.load(tmp_path / "both").encode(text)
