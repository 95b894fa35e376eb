"""Infilling against the formats written out, the cuts recomputed, and the text put together again."""

from __future__ import annotations

import io
import itertools
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from herd import UsageError, tokenizer
from herd.corpus import Document, pack_tokens
from herd.corpus.infilling import Infilling, infilled, pack_infilled
from herd.corpus.order import hashed_counters

MARKS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = (folder / "textwrap.py").read_text() + (folder / "string.py").read_text()
    return [source[i : i + 300] for i in range(0, len(source), 300)]


@pytest.fixture(scope="module")
def code(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    """A vocabulary of Code Llama's kind, made by SentencePiece itself."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_writer=written, vocab_size=700, model_type="bpe",
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=list(MARKS), minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return tokenizer.load(path)


def _taken_apart(ids: list[int], code: tokenizer.Tokenizer) -> tuple[str, list[list[int]]]:
    """The order of a cut document, and its pieces: prefix, suffix and middle, or suffix and prefix with middle."""
    pre, suf, mid, eot = (code.specials[name] for name in MARKS)
    marks = [i for i in ids if i in (pre, suf, mid, eot)]
    assert marks == [pre, suf, mid, eot] and ids[0] == code.bos_id and ids[-2:] == [eot, code.eos_id]
    assert ids[1] == pre
    at = [ids.index(mark) for mark in marks]
    pieces = [ids[a + 1 : b] for a, b in itertools.pairwise(at)]
    return ("SPM", pieces[1:]) if at[1] == 2 and not pieces[0] else ("PSM", pieces)


def _cuts(seed: int, index: int, length: int) -> tuple[int, int, int, int]:
    chance, order, *places = (int(n) for n in hashed_counters(4, seed, index))
    start, end = sorted(place * (length + 1) // 2**64 for place in places)
    return chance, order, start, end


def test_every_document_is_one_of_the_three_forms(texts: list[str], code: tokenizer.Tokenizer) -> None:
    """Encoded by the formats as they are written down, with the library's own processor for whole texts."""
    bos, eos = code.bos_id, code.eos_id
    pre, suf, mid, eot = (code.specials[name] for name in MARKS)
    encode, go_on = code.encode, code.vocabulary.encode_continuation
    forms: Counter[str] = Counter()
    for index, text in enumerate(texts):
        ids = infilled(text, code, Infilling(), 5, index)
        chance, order, start, end = _cuts(5, index, len(text))
        prefix, middle, suffix = text[:start], text[start:end], text[end:]
        if chance >= 0.9 * 2**64:
            form, expected = "whole", [bos, *encode(text), eos]
        elif order < 2**63:
            form, expected = "SPM", [bos, pre, suf, *go_on(suffix), mid, *encode(prefix + middle), eot, eos]
        else:
            form = "PSM"
            expected = [bos, pre, *encode(prefix), suf, *go_on(suffix), mid, *go_on(middle), eot, eos]
        assert ids == expected
        forms[form] += 1
    assert set(forms) == {"whole", "SPM", "PSM"}


def test_the_text_comes_together_again(texts: list[str], code: tokenizer.Tokenizer) -> None:
    for index, text in enumerate(texts):
        ids = infilled(text, code, Infilling(share=1.0), 1, index)
        form, pieces = _taken_apart(ids, code)
        words = [code.decode(piece, keep_first_space=True) for piece in pieces]
        if form == "SPM":  # the space that SentencePiece puts before a text is of the prefix alone
            assert words[1].removeprefix(" ") + words[0] == text or words[1][1:] + words[0] == text
        else:
            assert words[0][1:] + words[2] + words[1] == text


def test_shares_are_those_asked_for_and_cuts_are_even(code: tokenizer.Tokenizer) -> None:
    """Over many documents: nine of ten are cut, half of them in either order, anywhere."""
    text, counts, places = "x" * 99, Counter(), []
    pre, suf = code.specials["▁<PRE>"], code.specials["▁<SUF>"]
    for index in range(3000):
        ids = infilled(text, code, Infilling(), 0, index)
        counts["whole" if pre not in ids else "SPM" if ids[2] == suf else "PSM"] += 1
        if pre in ids:
            places += _cuts(0, index, len(text))[2:]
    assert counts["whole"] / 3000 == pytest.approx(0.1, abs=0.02)
    assert counts["SPM"] / 3000 == pytest.approx(0.45, abs=0.03)
    histogram = np.bincount(np.array(places) // 10, minlength=10)
    assert histogram.min() > 0.8 * len(places) / 10 and histogram.max() < 1.2 * len(places) / 10
    assert {0, 99} <= set(places)


def test_it_depends_on_seed_and_number_alone(texts: list[str], code: tokenizer.Tokenizer) -> None:
    how = Infilling(share=1.0)
    assert infilled(texts[0], code, how, 3, 8) == infilled(texts[0], code, how, 3, 8)
    assert infilled(texts[0], code, how, 3, 8) != infilled(texts[0], code, how, 3, 9)
    assert infilled(texts[0], code, how, 3, 8) != infilled(texts[0], code, how, 4, 8)


def test_documents_longer_than_a_row_stay_whole(texts: list[str], code: tokenizer.Tokenizer) -> None:
    whole = code.encode_document(texts[0])
    pre = code.specials["▁<PRE>"]
    # Pieces encoded apart may have a few tokens more than the text in one.
    for length in (len(whole) + 2, len(whole) + 3, len(whole) + 20):
        for index in range(20):
            ids = infilled(texts[0], code, Infilling(share=1.0, most_tokens=length), 0, index)
            assert len(ids) <= length + 1
            assert pre in ids or ids == whole
    assert any(pre in infilled(texts[0], code, Infilling(1.0, most_tokens=len(whole) + 20), 0, i) for i in range(20))
    assert pre not in infilled(texts[0], code, Infilling(1.0, most_tokens=len(whole) + 2), 0, 0)


def test_shards_hold_what_the_numbers_say(texts: list[str], code: tokenizer.Tokenizer, tmp_path: Path) -> None:
    documents = [Document(text, str(i)) for i, text in enumerate([texts[0], "", *texts[1:9]])]
    shards = pack_infilled(documents, code, tmp_path / "s", Infilling(), 7)
    assert [ids.tolist() for ids in shards] == [infilled(t, code, Infilling(), 7, i) for i, t in enumerate(texts[:9])]
    none = pack_infilled(documents, code, tmp_path / "n", Infilling(share=0.0), 7)
    assert [ids.tolist() for ids in none] == [ids.tolist() for ids in pack_tokens(documents, code, tmp_path / "p")]


def test_a_vocabulary_without_marks_is_refused(texts: list[str], tmp_path: Path) -> None:
    plain = tokenizer.train(texts, 400, n_specials=16)
    with pytest.raises(UsageError, match="no marks for infilling"):
        pack_infilled(texts[:2], plain, tmp_path / "s", Infilling(), 0)
