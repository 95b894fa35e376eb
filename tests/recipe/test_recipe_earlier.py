"""What recipes take from earlier work: vocabularies and checkpoints, by path or by run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd import tokenizer
from herd.corpus.document import Document, write_documents
from herd.errors import UsageError
from herd.recipe import stage_table
from herd.recipe.earlier import earlier, fingerprint
from herd.recipe.stages import BaseConfig
from herd.recipe.tokenise import TokenizerConfig, train_tokenizer

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus, and a run beside it whose base model has a vocabulary."""
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "train.jsonl", [Document(TEXT * n, f"t/{n}") for n in range(1, 9)])
    write_documents(tmp_path / "heldout.jsonl", [Document(TEXT, "h/1")])
    base = tmp_path / "runs" / "other" / "base-0123abcd"
    tokenizer.train([TEXT * 4], 285, n_specials=16).save(base / "checkpoint")
    (base.parent / "run.json").write_text(json.dumps({"stages": {"base": {"directory": base.name}}}))
    return tmp_path


@pytest.mark.parametrize("name", ["runs/other", "runs/other/base-0123abcd/checkpoint/tokenizer.json"])
def test_a_vocabulary_is_taken_and_may_get_marks(name: str, corpus: Path) -> None:
    results = train_tokenizer(TokenizerConfig(file=name), corpus, corpus / "same")
    taken, own = tokenizer.load(corpus / "same"), tokenizer.load("runs/other/base-0123abcd/checkpoint")
    assert results["vocab_size"] == taken.vocab_size == 285 and taken.specials == own.specials
    assert taken.encode(TEXT) == own.encode(TEXT)
    assert results["train"]["tokens"] == sum(len(own.encode(TEXT * n)) for n in range(1, 9))
    wider = train_tokenizer(TokenizerConfig(file=name, infilling=True), corpus, corpus / "wider")
    assert wider["vocab_size"] == 301 and tokenizer.load(corpus / "wider").specials["▁<EOT>"] == 288


def test_a_new_vocabulary_may_get_marks_too(corpus: Path) -> None:
    assert train_tokenizer(TokenizerConfig(vocab_size=280, infilling=True), corpus, corpus / "new")["vocab_size"] == 296


def test_what_is_not_there_says_which_recipe_makes_it(corpus: Path) -> None:
    for name, fix in (
        ("runs/llama2-7b", "herd run llama2-7b makes it"),
        ("runs/llama2-7b-shrunk", "herd run llama2-7b --shrink makes it"),
    ):
        with pytest.raises(UsageError, match=f"there is no such run yet; got {name}.*{fix}"):
            earlier(name)
    with pytest.raises(UsageError, match="there is no such model; got nowhere"):
        earlier("nowhere")


def test_a_fingerprint_follows_the_files(corpus: Path) -> None:
    assert fingerprint([None]) is None and fingerprint([]) is None
    before = fingerprint(["runs/other", None])
    assert before == fingerprint(["runs/other/base-0123abcd/checkpoint"])
    (corpus / "runs/other/base-0123abcd/checkpoint/tokenizer.json").write_text("{}")
    assert fingerprint(["runs/other"]) != before


def test_a_stage_is_known_by_the_shards_it_reads(corpus: Path, tmp_path: Path) -> None:
    stage = next(stage for stage in stage_table() if stage.name == "base")
    (tmp_path / "shards").mkdir()
    file = tmp_path / "shards" / "tokens.bin"
    file.write_bytes(b"1234")
    config = BaseConfig(sources={"old": {"weight": 1, "shards": [str(tmp_path / "shards")]}})
    assert stage.fingerprint is not None
    before = stage.fingerprint(config)
    assert before == stage.fingerprint(config) and stage.fingerprint(BaseConfig()) is None
    file.write_bytes(b"4321")
    assert stage.fingerprint(config) != before
