"""The whole stage: split, leaks, accounts, determinism, and the real standard library."""

from __future__ import annotations

import json
import lzma
import random
import time
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import HerdError
from herd.cli import main
from herd.cli.corpus import describe
from herd.corpus import CorpusConfig, CorpusStats, Document, NearDuplicates, curate, read_documents
from herd.corpus.pipeline import _split
from herd.corpus.split import Split, group_rank, is_heldout, overlaps, split_documents
from herd.corpus.stats import Step

WORDS = [f"{a}{b}{c}" for a, b, c in product("bdfgklm", "aeiou", "nrst")]


def prose(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(WORDS) + (".\n" if i % 9 == 8 else " ") for i in range(words)) + "\n"


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.replace(".", " ").split()
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def write_folder(root: Path, rng: random.Random) -> None:
    """Forty modules of three files; a third of the files is a slightly changed copy of one in another module."""
    texts: list[str] = []
    for module in range(40):
        folder = root / f"module{module}"
        folder.mkdir(parents=True)
        for part in range(3):
            if texts and rng.random() < 0.35:
                words = rng.choice(texts).split(" ")
                for _ in range(rng.choice((0, 1, 3, 12))):
                    words[rng.randrange(len(words))] = rng.choice(WORDS)
                text = " ".join(words)
            else:
                text = prose(rng, rng.randrange(80, 400))
            texts.append(text)
            (folder / f"part{part}.txt").write_text(text)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusStats, Path, float]:
    out = tmp_path_factory.mktemp("stdlib")
    started = time.process_time()
    return curate(CorpusConfig(), out), out, time.process_time() - started


def test_corpus_no_near_duplicate_straddles_the_split(tmp_path: Path) -> None:
    for seed in range(4):
        write_folder(tmp_path / f"in{seed}", random.Random(seed))
        config = CorpusConfig(sources=[str(tmp_path / f"in{seed}")], heldout_fraction=0.25, split_seed=seed)
        stats = curate(config, tmp_path / f"out{seed}")
        train, heldout = (
            list(read_documents(tmp_path / f"out{seed}" / f"{side}.jsonl")) for side in ("train", "heldout")
        )
        everything = [document for document in [*train, *heldout]]
        for i, a in enumerate(everything):
            for b in everything[i + 1 :]:
                sa, sb = shingles(a.text), shingles(b.text)
                assert len(sa & sb) / len(sa | sb) < 0.7 or a.group == b.group, (a.url, b.url)
        seen = set().union(*(shingles(d.text) for d in train))
        shares = [len(shingles(d.text) & seen) / len(shingles(d.text)) for d in heldout]
        assert max(shares) <= 0.5 and stats.max_overlap == pytest.approx(max(shares), abs=1e-4)
        assert {d.group for d in train}.isdisjoint(d.group for d in heldout)
        assert stats.heldout_groups == sorted({d.group for d in heldout})


def test_corpus_accounts_balance_and_bytes_repeat(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", random.Random(7))
    (tmp_path / "in/module0/blank.txt").write_bytes(b"\x01 \n")
    config = CorpusConfig(sources=[str(tmp_path / "in")], heldout_fraction=0.2)
    stats = curate(config, tmp_path / "a")
    curate(config, tmp_path / "b")
    for name in ("train.jsonl", "heldout.jsonl", "stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert stats.steps[0].documents_out == stats.sources["documents"]
    for before, after in zip(stats.steps, stats.steps[1:], strict=False):
        assert (before.documents_out, before.bytes_out) == (after.documents_in, after.bytes_in)
    for step in stats.steps[2:]:
        removed = [reason for name, reason in step.reasons.items() if name != "lines removed"]
        assert step.documents_in - step.documents_out == sum(reason.documents for reason in removed)
        assert step.bytes_in - step.bytes_out == sum(reason.bytes for reason in step.reasons.values())
    train = list(read_documents(tmp_path / "a/train.jsonl"))
    assert (len(train), sum(d.n_bytes for d in train)) == (stats.train_documents, stats.train_bytes)
    data = json.loads((tmp_path / "a/stats.json").read_text())
    assert data["config"]["heldout_fraction"] == 0.2 and data["steps"][3]["reasons"]["near duplicate"]["examples"]
    assert str(tmp_path) not in (tmp_path / "a/train.jsonl").read_text()
    text = describe(stats, tmp_path / "a")
    assert "near duplicate" in text and f"{stats.train_bytes:,} bytes" in text


@given(st.text(max_size=20), st.integers(0, 99))
def test_corpus_split_depends_on_the_group_alone(group: str, seed: int) -> None:
    rank = group_rank(group, seed)
    assert 0 <= rank < 1 and rank == group_rank(group, seed)
    one, two = (Document(t, t, meta={"group": group}) for t in ("a", "b"))
    assert is_heldout(one, 0.3, seed) == is_heldout(two, 0.3, seed) == (rank < 0.3)


def test_corpus_split_fraction_is_kept_on_average() -> None:
    ranks = [group_rank(f"group{i}", 0) for i in range(20000)]
    assert sum(rank < 0.04 for rank in ranks) / 20000 == pytest.approx(0.04, abs=0.006)


@pytest.mark.parametrize(
    ("groups", "documents", "how"),
    [(200, 1, "module"), (10, 8, "module by rank"), (1, 60, "document by rank"), (1, 3, "tail"), (1, 1, "tail")],
)
def test_corpus_every_corpus_gets_a_heldout_part(groups: int, documents: int, how: str) -> None:
    rng = random.Random(3)
    everything = [
        Document(prose(rng, 700), f"g{g}/{d}", meta={"group": f"g{g}"}) for g in range(groups) for d in range(documents)
    ]
    fraction = 0.07 if groups == 10 else 0.04  # of ten groups one is a tenth: it fits into twice 0.07 only
    split = split_documents(everything, fraction, 0)
    assert split.how == how
    size = sum(d.n_bytes for d in split.heldout) / sum(d.n_bytes for d in everything)
    assert fraction / 4 <= size <= fraction * 4
    if how == "tail":
        assert [a.text + b.text for a, b in zip(split.train, split.heldout, strict=True)] == [
            d.text for d in everything
        ]
        assert all(d.text.endswith("\n") for d in split.train)
    else:
        assert sorted(d.url for d in [*split.train, *split.heldout]) == sorted(d.url for d in everything)
    assert split_documents(everything, 0.0, 0) == Split(everything, [], "none")


def test_corpus_overlap_is_exact() -> None:
    rng = random.Random(5)
    held = Document(prose(rng, 100), "h")
    half = " ".join(held.text.split(" ")[:50])
    train = [Document(prose(rng, 100), "t0"), Document(half, "t1"), Document("", "t2")]
    (overlap,) = overlaps(Split(train, [held], ""), 5)
    a, b = shingles(held.text), shingles(half)
    assert overlap.nearest == "t1"
    assert overlap.similarity == pytest.approx(len(a & b) / len(a | b))
    assert overlap.contained == pytest.approx(len(a & b) / len(a))


def test_corpus_nothing_left_names_the_filter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.py").write_text(f"x = {i}\n")
    with pytest.raises(HerdError, match=r"'quality'.*removed all 3 documents.*code\.min_bytes 3"):
        curate(CorpusConfig(sources=[str(tmp_path / "in")]), tmp_path / "out")
    assert not (tmp_path / "out" / "stats.json").exists()


def test_corpus_verb_prints_tables_json_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "in", random.Random(1))
    arguments = ["corpus", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--heldout", "0.2"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0 and "near duplicate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out/stats.json").read_text())
    with pytest.raises(SystemExit) as done:
        main(["corpus", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.value.code == 2 and "there is no such source" in capsys.readouterr().err


def test_corpus_copy_of_heldout_text_is_taken_from_train(tmp_path: Path) -> None:
    rng = random.Random(11)
    (tmp_path / "in").mkdir()
    names = [f"n{i}" for i in range(60)]
    held = next(name for name in names if group_rank(f"in/{name}", 4) < 0.1)
    text = prose(rng, 300)
    for name in names:
        (tmp_path / f"in/{name}.txt").write_text(prose(rng, 300))
    (tmp_path / "in/aaa.txt").write_text(text)
    (tmp_path / "in/aab.txt").write_text(text + prose(rng, 20))  # longer, which decides among equals only
    (tmp_path / f"in/{held}.txt").write_text(text)
    stats = curate(CorpusConfig(sources=[str(tmp_path / "in")], heldout_fraction=0.1), tmp_path / "out")
    assert f"in/{held}" in stats.heldout_groups
    assert stats.steps[2].reasons["exact duplicate"].examples == [f"in/aaa.txt = in/{held}.txt"]
    assert stats.steps[3].reasons["near duplicate"].examples == [f"in/aab.txt ~ in/{held}.txt"]


def test_corpus_split_drops_what_the_search_for_duplicates_missed() -> None:
    rng = random.Random(13)
    text = prose(rng, 300)
    documents = [Document(prose(rng, 300), f"n{i}") for i in range(60)]
    held = next(d for d in documents if is_heldout(d, 0.1, 4))
    documents[documents.index(held)] = Document(text, held.url)
    documents.append(Document(text + prose(rng, 20), next(f"m{i}" for i in range(99) if group_rank(f"m{i}", 4) > 0.1)))
    config = CorpusConfig(heldout_fraction=0.1, near_duplicates=NearDuplicates(max_overlap=1.0))
    step = Step("split", 0, 0)
    split, worst = _split(documents, config, step)
    assert step.reasons["near duplicate in train"].documents == 1 and worst is not None and worst < 0.1
    assert held.url not in [d.url for d in split.heldout] and documents[-1] in split.train


def test_corpus_stdlib_becomes_a_clean_corpus(stdlib: tuple[CorpusStats, Path, float]) -> None:
    stats, out, seconds = stdlib
    train = {d.url: d for d in read_documents(out / "train.jsonl")}
    heldout = list(read_documents(out / "heldout.jsonl"))
    assert seconds < 60  # CPU seconds; about 5 on a desktop core
    assert 6e6 < stats.train_bytes < 15e6
    assert 100_000 < stats.heldout_bytes < 600_000 and stats.split == "module"
    # Code tables and generated modules are gone, ordinary modules are not.
    urls = [*train, *(d.url for d in heldout)]
    assert not [url for url in urls if "encodings/cp12" in url or "encodings/mac_" in url]
    for name in ("json/decoder", "json/__init__", "argparse", "collections/__init__", "heapq"):
        assert f"python-stdlib/{name}.py" in urls
    assert not [d for d in train.values() if "Licensed to PSF under a Contributor Agreement" in d.text]
    compressed = lzma.compress("".join(d.text for d in heldout).encode(), preset=9 | lzma.PRESET_EXTREME)
    assert 1.6 < 8 * len(compressed) / stats.heldout_bytes < 2.2


@pytest.mark.skipif("sys.version_info[:2] != (3, 11)")
def test_corpus_heldout_of_python_3_11(stdlib: tuple[CorpusStats, Path, float]) -> None:
    stats, out, _ = stdlib
    assert 150_000 <= stats.heldout_bytes <= 400_000 and len(stats.heldout_groups) >= 8
    sizes: dict[str, int] = {}
    for document in read_documents(out / "heldout.jsonl"):
        sizes[document.group] = sizes.get(document.group, 0) + document.n_bytes
    assert max(sizes.values()) <= stats.heldout_bytes / 4


def test_corpus_peps_are_read_from_jsonl(shared_data: Path, tmp_path: Path) -> None:
    stats = curate(CorpusConfig(sources=[str(shared_data / "text/peps.jsonl.gz")]), tmp_path)
    assert stats.sources["documents"] == 736
    assert stats.train_documents + stats.heldout_documents > 700
    lines = stats.steps[4].reasons["lines removed"]
    assert any("public domain" in example for example in lines.examples)


def test_corpus_one_book_is_enough(shared_data: Path, tmp_path: Path) -> None:
    stats = curate(CorpusConfig(sources=[str(shared_data / "text/tinyshakespeare.txt")]), tmp_path)
    assert stats.split == "tail"
    assert stats.heldout_bytes / (stats.heldout_bytes + stats.train_bytes) == pytest.approx(0.04, abs=0.001)
