"""Vocabularies of every kind: real ones where the test data is, small ones of the same kinds anywhere."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from herd import tokenizer
from herd.tokenizer.bytelevel import ByteLevelVocabulary
from herd.tokenizer.specials import LLAMA4_PATTERN, LLAMA4_SPECIALS, numbered

STDLIB = Path(sysconfig.get_paths()["stdlib"])
CODE_LLAMA_PIECES = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real text that every machine has, with some that is not English added."""
    names = ("argparse.py", "textwrap.py", "string.py", "json/decoder.py", "email/header.py", "unicodedata.txt")
    found = [(STDLIB / name).read_text(encoding="utf-8") for name in names if (STDLIB / name).exists()]
    return [*found, "Grüße aus 北京 🦙🦙, нещо на Български កាន់តែពិសេស ½ ① ﷽ e\u0301\u0301\n\n\t  \u3000x\u200d\r\n"]


@pytest.fixture(scope="session")
def small_llama3(texts: list[str]) -> tokenizer.Tokenizer:
    """Byte-level, 1,000 tokens, Llama 3's special tokens."""
    return tokenizer.train(texts, 1000)


@pytest.fixture(scope="session")
def small_llama4(small_llama3: tokenizer.Tokenizer) -> tokenizer.Tokenizer:
    """The same ranks with Llama 4's pattern and special tokens."""
    vocabulary = small_llama3.vocabulary
    assert isinstance(vocabulary, ByteLevelVocabulary)
    specials = numbered(LLAMA4_SPECIALS, len(vocabulary.ranks), 2048)
    return tokenizer.Tokenizer(ByteLevelVocabulary(vocabulary.ranks, LLAMA4_PATTERN, specials))


def _train_sentencepiece(texts: list[str], path: Path, *, symbols: list[str] | None = None, **options: object) -> Path:
    """A SentencePiece model with Llama 2's settings, trained and written by the SentencePiece library itself."""
    import sentencepiece

    written = io.BytesIO()
    settings: dict[str, object] = {
        "vocab_size": 1000,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": symbols or [],
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_writer=written, **(settings | options)
    )
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., Path]:
    return _train_sentencepiece


@pytest.fixture(scope="session")
def small_llama2_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train_sentencepiece(texts, tmp_path_factory.mktemp("llama2") / "tokenizer.model")


@pytest.fixture(scope="session")
def small_code_llama_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With Code Llama's added pieces as user-defined symbols, which the library alone would find in any text."""
    return _train_sentencepiece(texts, tmp_path_factory.mktemp("code") / "tokenizer.model", symbols=CODE_LLAMA_PIECES)


@pytest.fixture(scope="session")
def small_llama2(small_llama2_file: Path) -> tokenizer.Tokenizer:
    return tokenizer.load(small_llama2_file)


@pytest.fixture(scope="session")
def small_code_llama(small_code_llama_file: Path) -> tokenizer.Tokenizer:
    return tokenizer.load(small_code_llama_file)


SMALL = ("small_llama2", "small_code_llama", "small_llama3", "small_llama4")
REAL = {
    "llama2": "ggml-vocab-llama-spm.gguf",
    "llama3": "llama3.tokenizer.model",
    "llama4": "llama4.tokenizer.model",
}


@pytest.fixture(scope="session")
def real(shared_data: Path) -> dict[str, tokenizer.Tokenizer]:
    """Llama 2, 3 and 4 as released."""
    return {name: tokenizer.load(shared_data / "tokenizers" / file) for name, file in REAL.items()}


@pytest.fixture(params=[*SMALL, *REAL])
def any_tokenizer(request: pytest.FixtureRequest) -> tokenizer.Tokenizer:
    """Each kind of vocabulary, small ones on every machine."""
    if request.param in SMALL:
        return request.getfixturevalue(request.param)
    return request.getfixturevalue("real")[request.param]


@pytest.fixture(params=[*SMALL, "llama2", "llama3", pytest.param("llama4", marks=pytest.mark.slow)])
def saved_tokenizer(request: pytest.FixtureRequest) -> tokenizer.Tokenizer:
    """The same, for tests that write whole vocabularies: the largest one is for `make test-all`."""
    if request.param in SMALL:
        return request.getfixturevalue(request.param)
    return request.getfixturevalue("real")[request.param]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tokenizer.Tokenizer], Path]:
    """Save a tokenizer once for all tests that only read the files."""
    folders: dict[int, Path] = {}

    def save(one: tokenizer.Tokenizer) -> Path:
        if id(one) not in folders:
            folders[id(one)] = tmp_path_factory.mktemp("saved")
            one.save(folders[id(one)])
        return folders[id(one)]

    return save


@pytest.fixture(scope="session")
def peps(shared_data: Path) -> list[str]:
    """A sample of real documents, about 1.1 MB: every tenth of Python's enhancement proposals."""
    with gzip.open(shared_data / "text" / "peps.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file][::10]


@pytest.fixture(scope="session")
def llama_cpp_cases(shared_data: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """llama.cpp's test texts with the ids it expects, for Llama 2 ("spm") and Llama 3 ("bpe")."""
    cases = {}
    for kind in ("spm", "bpe"):
        stem = shared_data / "tokenizers" / f"ggml-vocab-llama-{kind}.gguf"
        inputs = stem.with_name(stem.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
        outputs = stem.with_name(stem.name + ".out").read_text(encoding="utf-8").splitlines()
        cases[kind] = [(text, [int(i) for i in ids.split()]) for text, ids in zip(inputs, outputs, strict=True)]
    return cases
