"""Code Llama's marks in a vocabulary that had none."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd import tokenizer
from herd.errors import UsageError
from herd.tokenizer import Tokenizer
from herd.tokenizer.infilling import with_infilling

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return tokenizer.train([TEXT * 3, "▁<PRE> and <PRE>"], 290, n_specials=16)


def test_sixteen_ids_follow_and_nothing_else_changes(plain: Tokenizer) -> None:
    wider = with_infilling(plain)
    assert wider.vocab_size == plain.vocab_size + 16 == 306
    assert [wider.specials[mark] for mark in ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")] == [290, 291, 292, 293]
    assert {name: number for name, number in wider.specials.items() if number < 290} == plain.specials
    assert wider.encode(TEXT) == plain.encode(TEXT) and wider.chat_format == plain.chat_format
    assert 293 in wider.stop_ids and with_infilling(wider) is wider


def test_prompts_are_code_llamas(plain: Tokenizer) -> None:
    wider = with_infilling(plain)
    before, after = plain.encode("def "), plain.encode("(x)")
    assert wider.encode_infill("def ", "(x)") == [wider.bos_id, 290, *before, 292, *after, 291]
    assert wider.encode_infill("def ", "(x)", suffix_first=True) == [wider.bos_id, 290, 292, *after, 291, *before]


def test_text_never_becomes_a_mark_and_files_keep_them(plain: Tokenizer, tmp_path: Path) -> None:
    wider = with_infilling(plain)
    wider.save(tmp_path)
    again = tokenizer.load(tmp_path)
    for one in (wider, again):
        assert one.specials == wider.specials and one.vocab_size == 306
        ids = one.encode("▁<PRE> and ▁<EOT>")
        assert max(ids) < 290 and one.decode(ids) == "▁<PRE> and ▁<EOT>"
    from tokenizers import Tokenizer as Peer

    peer = Peer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.get_vocab_size() == 306 and peer.token_to_id("▁<MID>") == 291


def test_a_sentencepiece_vocabulary_is_refused(small_llama2: Tokenizer, small_code_llama: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"use the tokenizer\.model of a Code Llama"):
        with_infilling(small_llama2)
    assert with_infilling(small_code_llama) is small_code_llama
