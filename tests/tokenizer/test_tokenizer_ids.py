"""Ids are those of tiktoken, SentencePiece, transformers' library and llama.cpp."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from herd import tokenizer
from herd.errors import HerdError, UsageError
from herd.tokenizer.bytelevel import bounded_slices
from herd.tokenizer.spmodel import write_model
from herd.tokenizer.tokenizer import Tokenizer

# Written again here, from meta-llama/llama-models, so that a slip in herd.tokenizer.specials is seen.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA4_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("name", "pattern"), [("llama3", LLAMA3_REGEX), ("llama4", LLAMA4_REGEX)])
def test_ids_equal_tiktoken_on_peps(
    shared_data: Path,
    real: dict[str, Tokenizer],
    peps: list[str],
    llama_cpp_cases: dict[str, list[tuple[str, list[int]]]],
    name: str,
    pattern: str,
) -> None:
    ranks = load_tiktoken_bpe(str(shared_data / "tokenizers" / f"{name}.tokenizer.model"))
    oracle = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    corners = "x);\n// a\n\n/*\r\n/ IT'S it's we'LL 1234567 ǅungla ʰʰ ªº Été e\u0301TE\u0301  \n \t x\u00a0y  !?\n\n "
    for text in [*peps, corners, *[text for text, _ in llama_cpp_cases["bpe"]]]:
        ids = real[name].encode(text)
        assert ids == oracle.encode_ordinary(text)
        assert real[name].decode(ids) == text


def test_ids_equal_tokenizers_library_on_peps_for_llama2(
    shared_data: Path, real: dict[str, Tokenizer], peps: list[str]
) -> None:
    from tokenizers import Tokenizer as Oracle

    file = shared_data / "tokenizers" / "llama2.tokenizer.json"
    oracle = Oracle.from_file(str(file))
    from_json = tokenizer.load(file)
    for text in peps[::3]:
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert real["llama2"].encode(text) == expected
        assert from_json.encode(text) == expected
        assert real["llama2"].decode(expected) == text


@pytest.mark.parametrize(("kind", "name"), [("spm", "llama2"), ("bpe", "llama3")])
def test_ids_equal_llama_cpps_cases(
    llama_cpp_cases: dict[str, list[tuple[str, list[int]]]], real: dict[str, Tokenizer], kind: str, name: str
) -> None:
    assert len(llama_cpp_cases[kind]) == 46
    again = tokenizer.from_gguf_metadata(real[name].gguf_metadata())
    for text, ids in llama_cpp_cases[kind]:
        assert real[name].encode(text) == ids, text
        assert again.encode(text) == ids, text


def test_llama2_from_json_has_the_scores_that_gguf_has(shared_data: Path, real: dict[str, Tokenizer]) -> None:
    """Scores rebuilt from a merge list: those of the release, except for runs of spaces, whose order alone counts."""
    rebuilt = tokenizer.load(shared_data / "tokenizers" / "llama2.tokenizer.json").vocabulary.pieces
    for ours, released in zip(rebuilt, real["llama2"].vocabulary.pieces, strict=False):
        assert (ours.text, ours.type) == (released.text, released.type)
        assert ours.score == released.score or not ours.text.strip("▁")


def test_ids_equal_sentencepiece(small_llama2_file: Path, texts: list[str]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(small_llama2_file))
    ours = tokenizer.load(small_llama2_file)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (oracle.vocab_size(), oracle.bos_id(), oracle.eos_id())
    for line in "\n".join(texts).splitlines(keepends=True)[::3]:
        ids = oracle.encode(line)
        assert ours.encode(line) == ids
        assert ours.decode(ids) == oracle.decode(ids)
    for piece_id in range(oracle.vocab_size()):
        piece = ours.vocabulary.pieces[piece_id]
        assert (piece.text, piece.score) == (oracle.id_to_piece(piece_id), oracle.get_score(piece_id))


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_ids_equal_sentencepiece_on_any_text(small_llama2_file: Path, small_llama2: Tokenizer, text: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(small_llama2_file))
    assert small_llama2.encode(text) == oracle.encode(text)


def test_the_model_we_write_is_the_model_we_read(small_llama2_file: Path, small_llama2: Tokenizer) -> None:
    ours = sentencepiece.SentencePieceProcessor(model_proto=write_model(small_llama2.vocabulary.pieces, True))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(small_llama2_file))
    for i in range(theirs.vocab_size()):
        for ask in ("id_to_piece", "get_score", "is_control", "is_unknown", "is_byte", "is_unused"):
            assert getattr(ours, ask)(i) == getattr(theirs, ask)(i), (i, ask)


def test_encode_then_decode_gives_the_text(any_tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in [*texts, "", " ", "  two", "\n", "\x00\x7f", "🦙" * 50, "a" * 1000]:
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example("▁ a▁")
def test_any_text_survives(
    small_llama2: Tokenizer, small_llama3: Tokenizer, small_llama4: Tokenizer, text: str
) -> None:
    for each in (small_llama3, small_llama4):
        assert each.decode(each.encode(text)) == text
    # SentencePiece writes a space as ▁, so it cannot tell the two apart
    assert small_llama2.decode(small_llama2.encode(text)) == text.replace("▁", " ")


def test_lone_surrogates_become_the_replacement_character(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.decode(any_tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert any_tokenizer.encode("\ud83e\udd99") == any_tokenizer.encode("🦙")


def test_documents_begin_and_end(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode_document("some text")
    assert ids == [any_tokenizer.bos_id, *any_tokenizer.encode("some text"), any_tokenizer.eos_id]
    assert any_tokenizer.pad_id != any_tokenizer.eos_id
    assert any_tokenizer.eos_id in any_tokenizer.stop_ids


def test_decode_refuses_ids_that_do_not_exist(any_tokenizer: Tokenizer) -> None:
    for bad in (-1, any_tokenizer.vocab_size):
        with pytest.raises(UsageError, match="no such token id"):
            any_tokenizer.decode([any_tokenizer.bos_id, bad])
        with pytest.raises(UsageError, match=f"got {bad}"):
            any_tokenizer.token_bytes(bad)


def test_decode_shows_or_skips_control_tokens(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode_document("text")
    bos = any_tokenizer.token_bytes(any_tokenizer.bos_id).decode()
    assert any_tokenizer.decode(ids).startswith(bos)
    assert any_tokenizer.decode(ids, skip_specials=True) == "text"


def test_continuations_keep_their_first_space(small_llama2: Tokenizer) -> None:
    ids = small_llama2.encode("def")
    assert small_llama2.decode(ids) == "def"
    assert small_llama2.decode(ids, keep_first_space=True) == " def"
    joined = small_llama2.encode("return") + small_llama2.vocabulary.encode_continuation(" self")
    assert joined == small_llama2.encode("return self")


def test_released_special_tokens(real: dict[str, Tokenizer], shared_data: Path) -> None:
    """Ids from Meta's prompt-format documents and tokenizer sources."""
    llama3, llama4, llama2 = real["llama3"], real["llama4"], real["llama2"]
    assert llama3.vocab_size == 128_256
    expected = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|finetune_right_pad_id|>": 128004,
        "<|step_id|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|image|>": 128011,
        "<|reserved_special_token_2|>": 128012,
        "<|reserved_special_token_245|>": 128255,
    }
    assert {name: llama3.specials[name] for name in expected} == expected
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)
    assert llama3.stop_ids == {128001, 128008, 128009}

    first = tokenizer.load(shared_data / "tokenizers" / "llama3.tokenizer.model", chat_format="llama3")
    assert first.stop_ids == {128001, 128009}
    assert first.specials["<|reserved_special_token_4|>"] == 128008
    assert first.specials["<|reserved_special_token_250|>"] == 128255
    assert "<|python_tag|>" not in first.specials and first.pad_id == 128004

    assert llama4.vocab_size == 202_048
    expected = {
        "<|begin_of_text|>": 200000,
        "<|end_of_text|>": 200001,
        "<|fim_prefix|>": 200002,
        "<|header_start|>": 200005,
        "<|header_end|>": 200006,
        "<|eom|>": 200007,
        "<|eot|>": 200008,
        "<|step|>": 200009,
        "<|python_start|>": 200016,
        "<|python_end|>": 200017,
        "<|finetune_right_pad|>": 200018,
        "<|image_start|>": 200080,
        "<|image_end|>": 200081,
        "<|tile_x_separator|>": 200084,
        "<|tile_y_separator|>": 200085,
        "<|image|>": 200090,
        "<|patch|>": 200092,
        "<|vision_reserved_special_token_1047|>": 201133,
        "<|reasoning_thinking_start|>": 201142,
        "<|reasoning_thinking_end|>": 201143,
        "<|reserved_special_token_903|>": 202047,
    }
    assert {name: llama4.specials[name] for name in expected} == expected
    assert (llama4.pad_id, llama4.stop_ids) == (200018, {200001, 200007, 200008})

    assert llama2.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (llama2.bos_id, llama2.eos_id, llama2.pad_id, llama2.stop_ids) == (1, 2, 0, {2})


def meta_slices(text: str, longest_slice: int = 400_000, longest_run: int = 25_000) -> Iterator[str]:
    """The bounds of Meta's tokenizers, told character by character."""
    for begin in range(0, len(text), longest_slice):
        part, current, length = text[begin : begin + longest_slice], "", 0
        for i, character in enumerate(part):
            same = i > 0 and character.isspace() == part[i - 1].isspace()
            length = length + 1 if same else 1
            if length > longest_run:
                yield current
                current, length = "", 1
            current += character
        yield current


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000,
        "a" * 25_001,
        " " * 60_000,
        "b" + " " * 25_001 + "c" * 24_999 + "\n" * 50_001 + "end",
        "x" * 12_000 + " " + "y" * 26_000,
        ("word " * 5 + "w" * 24_990 + " ") * 4,
        "ab " * 140_000 + "z" * 30_000,
        "a" * 399_999 + " b" * 20 + "c" * 26_000,
    ],
)
def test_long_runs_are_cut_where_meta_cuts_them(text: str) -> None:
    assert list(bounded_slices(text)) == list(meta_slices(text))


@settings(max_examples=100, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from("ab \n\u3000"), st.integers(1, 60_000)), min_size=1, max_size=12))
def test_any_runs_are_cut_where_meta_cuts_them(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in runs)
    assert [len(part) for part in bounded_slices(text)] == [len(part) for part in meta_slices(text)]


def test_python_and_its_regular_expressions_agree_on_what_a_space_is() -> None:
    space = re.compile(r"\s")
    assert all(chr(i).isspace() == bool(space.match(chr(i))) for i in range(sys.maxunicode + 1))


def test_long_runs_are_encoded_part_by_part(small_llama3: Tokenizer) -> None:
    text = "ab" * 300_000 + " " * 30_000
    ids = small_llama3.encode(text)
    assert small_llama3.decode(ids) == text
    assert ids == [i for part in meta_slices(text) for i in small_llama3.encode(part)]


def test_a_tokenizer_travels_to_another_process(any_tokenizer: Tokenizer) -> None:
    any_tokenizer.encode("fill the caches")
    again = pickle.loads(pickle.dumps(any_tokenizer))
    assert again.encode("the same ids, 123 🦙") == any_tokenizer.encode("the same ids, 123 🦙")
    assert again.encode_dialog([{"role": "user", "content": "x"}]) == any_tokenizer.encode_dialog(
        [{"role": "user", "content": "x"}]
    )


def test_merge_lists_that_ranks_cannot_express(small_llama3: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """A third-party tokenizer.json may lack merges, or look up no whole words; ids must be its own all the same."""
    from tokenizers import Tokenizer as Oracle

    small_llama3.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    complete = json.loads(file.read_text())
    for change in ("merges", "ignore_merges"):
        data = json.loads(json.dumps(complete))
        if change == "merges":
            data["model"]["merges"] = data["model"]["merges"][::2]
        else:
            data["model"]["ignore_merges"] = False
        file.write_text(json.dumps(data))
        oracle = Oracle.from_file(str(file))
        ours = tokenizer.load(file)
        for text in texts:
            assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids
        again = tokenizer.from_gguf_metadata(ours.gguf_metadata())
        if change == "merges":
            assert small_llama3.encode(texts[0]) != ours.encode(texts[0])
            assert again.encode("differing") == Oracle.from_file(str(file)).encode("differing").ids[1:]
            with pytest.raises(HerdError, match="cannot be written as a tokenizer"):
                ours.save(tmp_path / "meta", layout="meta")
