"""Training: any size, always the same result, and really the most frequent pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import tokenizer
from herd.errors import HerdError, UsageError
from herd.tokenizer.specials import LLAMA3_PATTERN, LLAMA3_SPECIALS


def brute_force(texts: list[str], n_merges: int) -> list[bytes]:
    """Byte pair encoding as Sennrich et al. 2016 print it; ties go to the pair with the lower ids."""
    order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order += [byte for byte in range(256) if byte not in order]
    rank = {bytes([byte]): i for i, byte in enumerate(order)}
    words = Counter(piece for text in texts for piece in regex.findall(LLAMA3_PATTERN, text))
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merged = []
    for _ in range(n_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], rank[pair[0]], rank[pair[1]]))
        token = best[0] + best[1]
        if token not in rank:
            rank[token] = len(rank)
            merged.append(token)
        for tokens in split.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i : i + 2] = [token]
                i += 1
    return merged


def test_merges_are_those_of_the_algorithm_itself(texts: list[str]) -> None:
    sample = [text[:3000] for text in texts]
    trained = tokenizer.train(sample, 256 + 60 + 11, n_specials=11)
    assert list(trained.vocabulary.table[256:316]) == brute_force(sample, 60)


@pytest.mark.parametrize(("vocab_size", "n_specials"), [(267, 11), (300, None), (300, 16), (512, 256), (2048, None)])
def test_any_size(texts: list[str], vocab_size: int, n_specials: int | None) -> None:
    trained = tokenizer.train(texts, vocab_size, n_specials=n_specials)
    assert trained.vocab_size == vocab_size
    expected = n_specials or {300: 18, 2048: 128}[vocab_size]
    assert list(trained.specials) == list(LLAMA3_SPECIALS[:expected])
    assert list(trained.specials.values()) == list(range(vocab_size - expected, vocab_size))
    assert trained.chat_format == "llama3.1"
    for text in texts:
        assert trained.decode(trained.encode(text)) == text
    assert trained.encode_dialog([{"role": "user", "content": "x"}]).ids[0] == vocab_size - expected


@pytest.mark.slow
def test_the_size_of_llama_3(peps: list[str], shared_data: Path) -> None:
    wikitext = (shared_data / "text" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    files = [path for path in Path(os.__file__).parent.rglob("*.py") if "site-packages" not in path.parts]
    standard = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    trained = tokenizer.train([*peps, wikitext, *standard], 128_256)
    assert (trained.vocab_size, len(trained.specials)) == (128_256, 256)
    assert trained.bos_id == 128_000


def test_the_default_has_all_special_tokens_from_4096_on(texts: list[str]) -> None:
    trained = tokenizer.train(texts, 4096)
    assert len(trained.specials) == 256 and trained.vocab_size == 4096


def test_order_of_texts_and_repetition_change_nothing(texts: list[str], small_llama3: tokenizer.Tokenizer) -> None:
    for again in (texts, texts[::-1], iter(texts)):
        assert tokenizer.train(again, 1000).vocabulary.ranks == small_llama3.vocabulary.ranks


def test_threads_and_hash_seeds_change_nothing(tmp_path: Path, texts: list[str]) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n".join(texts), encoding="utf-8")
    program = (
        "import hashlib, sys; from herd import tokenizer;"
        "lines = open(sys.argv[1], encoding='utf-8').read().splitlines(keepends=True);"
        "print(hashlib.sha256(repr(tokenizer.train(lines, 1500).vocabulary.ranks).encode()).hexdigest())"
    )
    found = set()
    for seed, threads in (("0", "1"), ("1", "4")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": str(threads != "1").lower(),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", program, str(source)]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    assert len(found) == 1


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), max_size=20))
def test_any_texts_train_or_are_told_to_be_too_few(texts: list[str]) -> None:
    try:
        trained = tokenizer.train(texts, 280, n_specials=11)
    except HerdError as error:
        assert "lower vocab_size or give more text" in str(error)
        return
    for text in texts:
        assert trained.decode(trained.encode(text)) == text.encode("utf-8", "replace").decode()


def test_sizes_that_do_not_fit_are_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"got 266.*at least 267"):
        tokenizer.train(texts, 266)
    with pytest.raises(UsageError, match="at least 512"):
        tokenizer.train(texts, 300, n_specials=256)
    for wrong in (2, 257):
        with pytest.raises(UsageError, match="wrong number of special tokens"):
            tokenizer.train(texts, 1000, n_specials=wrong)
    with pytest.raises(HerdError, match=r"300.* wanted|wanted"):
        tokenizer.train(["abc"], 600)
