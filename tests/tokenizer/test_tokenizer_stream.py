"""Streaming decode: the same text, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd.tokenizer.tokenizer import Tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*[stream.push(i) for i in ids], stream.flush()]


def test_characters_of_many_tokens_come_out_whole(any_tokenizer: Tokenizer) -> None:
    text = "🦙 llama, 北京, 👨‍👩‍👧 é\u0301 កាន់"
    pieces = pieces_of(any_tokenizer, any_tokenizer.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] == "" and not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(
    small_llama2: Tokenizer, small_llama3: Tokenizer, data: st.DataObject
) -> None:
    """Any ids, so also bytes in an order that is no text, and control tokens in the middle of a character."""
    tokenizer = data.draw(st.sampled_from([small_llama2, small_llama3]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip, keep = data.draw(st.booleans()), data.draw(st.booleans())
    pieces = pieces_of(tokenizer, ids, skip_specials=skip, keep_first_space=keep)
    assert "".join(pieces) == tokenizer.decode(ids, skip_specials=skip, keep_first_space=keep)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example("▁ a▁")
def test_any_text_streams_without_replacement(small_llama2: Tokenizer, small_llama3: Tokenizer, text: str) -> None:
    for tokenizer in (small_llama2, small_llama3):
        pieces = pieces_of(tokenizer, tokenizer.encode(text))
        # SentencePiece writes a space as ▁, so it cannot tell the two apart
        assert "".join(pieces) == (text.replace("▁", " ") if tokenizer is small_llama2 else text)
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_flush_tells_that_a_character_was_cut(small_llama3: Tokenizer) -> None:
    stream = small_llama3.stream()
    first = small_llama3.vocabulary.table.index(b"\xf0")
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("keep", [False, True])
def test_sentencepieces_first_space(small_llama2: Tokenizer, keep: bool) -> None:
    ids = small_llama2.encode("return self")
    assert "".join(pieces_of(small_llama2, ids, keep_first_space=keep)) == (" " if keep else "") + "return self"
    # a control token before the text does not use up the space that encoding put there
    assert small_llama2.decode([small_llama2.bos_id, *ids], skip_specials=True) == "return self"
