"""Infilling as a setting of the stage: what it packs, what it trains on, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from herd import tokenizer
from herd.architecture import LlamaConfig
from herd.corpus import Document, TokenShards
from herd.corpus.document import write_documents
from herd.corpus.infilling import Infilling, infilled
from herd.errors import UsageError
from herd.pretrain import PretrainConfig, run

MARKS = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
TEXTS = ["\n".join(f"def f{n + i}(a):\n    return a + {i}\n" for i in range(1 + n % 9)) for n in range(80)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    kinds = ("code", "prose")
    write_documents(
        folder / "train.jsonl", [Document(t, str(n), meta={"kind": kinds[n % 2]}) for n, t in enumerate(TEXTS)]
    )
    return folder


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).splitlines()), model_writer=written, vocab_size=300, model_type="bpe",
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=MARKS, minloglevel=2, num_threads=1,
        hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return tokenizer.load(path)


def _shape(words: tokenizer.Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        dim=16, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, ffn_dim=32, vocab_size=words.vocab_size,
        context_length=128,
    )  # fmt: skip


TRAIN = {"steps": 3, "seq_len": 64, "batch_size": 4, "compile": "off", "checkpoint_seconds": 0}


def test_only_the_source_that_says_so_is_cut(corpus: Path, code: tokenizer.Tokenizer, tmp_path: Path) -> None:
    sources = {"code": {"weight": 1, "kind": "code", "infilling": 0.9}, "prose": {"weight": 1}}
    config = PretrainConfig.model_validate({"seed": 3, "sources": sources, "train": TRAIN, "packing": "best_fit"})
    run(config, _shape(code), corpus, code, tmp_path)
    how = Infilling(0.9, most_tokens=64)
    expected = [infilled(text, code, how, 3, index) for index, text in enumerate(TEXTS[::2])]
    assert [ids.tolist() for ids in TokenShards(tmp_path / "tokens/train-code")] == expected
    whole = [code.encode_document(text) for text in TEXTS[1::2]]
    assert [ids.tolist() for ids in TokenShards(tmp_path / "tokens/train-prose")] == whole
    pre = code.specials["▁<PRE>"]
    cut = [ids for ids in expected if pre in ids]
    # Documents that fit into a row are, but for a tenth; those that do not are none.
    fitting = [text for text in TEXTS[::2] if len(code.encode_document(text)) < 55]
    assert 0.7 * len(fitting) < len(cut) < 40 and all(len(ids) <= 65 for ids in cut)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


def test_without_sources_it_is_said_of_the_whole(corpus: Path, code: tokenizer.Tokenizer, tmp_path: Path) -> None:
    config = PretrainConfig.model_validate({"infilling": 1.0, "train": TRAIN})
    run(config, _shape(code), corpus, code, tmp_path)
    shards = TokenShards(tmp_path / "tokens/train")
    assert [ids.tolist() for ids in shards] == [
        infilled(text, code, Infilling(1.0, most_tokens=64), 0, index) for index, text in enumerate(TEXTS)
    ]


def test_a_vocabulary_without_marks_is_refused(corpus: Path, tmp_path: Path) -> None:
    words = tokenizer.train(TEXTS, 280, n_specials=16)
    config = PretrainConfig.model_validate({"infilling": 0.9, "train": TRAIN})
    with pytest.raises(UsageError, match="no marks for infilling"):
        run(config, _shape(words), corpus, words, tmp_path)
