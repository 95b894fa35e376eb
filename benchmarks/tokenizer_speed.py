"""Encoding, decoding and training speed: Herd's tokenizer beside tiktoken, `tokenizers` and rustbpe where it is there.

    python benchmarks/tokenizer_speed.py [--vocabulary FILE] [--megabytes 8] [--repeats 7]

The text is the running Python's own standard library, in documents of 10 kB, and the documentation strings in it as
something like English. Without --vocabulary a 32,000-token vocabulary is trained first. Everything runs in one thread,
one after the other in each repeat; figures are medians of MB per second of CPU time, and Herd's as a share of
tiktoken's called directly. That ids are equal is checked first.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

DOCUMENT = 10_000  # characters


def standard_library(megabytes: float) -> tuple[list[str], list[str]]:
    """Source code and the English in it, as documents of 10 kB, about this many MB each where there is so much."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    prose = [text for source in sources for text in re.findall(r'"""(.{200,}?)"""', source, re.DOTALL)]
    return documents("".join(sources), megabytes), documents("\n\n".join(prose), megabytes)


def documents(text: str, megabytes: float) -> list[str]:
    text = text[: int(megabytes * 1e6)]
    return [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]


def peers(herd_tokenizer: Any) -> dict[str, tuple[Callable[[str], object], Callable[[list[int]], object]]]:
    """Name -> (encode, decode) on the same vocabulary; tiktoken is called directly, without Herd."""
    import tiktoken
    from tokenizers import Tokenizer

    from herd.tokenizer.hf_write import tokenizer_json

    vocabulary = herd_tokenizer.vocabulary
    raw = tiktoken.Encoding("raw", pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={})
    hugging = Tokenizer.from_str(tokenizer_json(herd_tokenizer))
    return {
        "herd": (herd_tokenizer.encode, herd_tokenizer.decode),
        "tiktoken": (raw.encode_ordinary, raw.decode),
        "tokenizers": (lambda text: hugging.encode(text, add_special_tokens=False).ids, hugging.decode),
    }


def speeds(calls: dict[str, Callable[[], object]], size: int, repeats: int) -> dict[str, float]:
    """Median MB/s of each call, interleaved so that a busy moment hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {name: size / statistics.median(taken) / 1e6 for name, taken in seconds.items()}


def run_all(function: Callable[[Any], object], inputs: list[Any]) -> Callable[[], object]:
    return lambda: [function(item) for item in inputs]


def show(title: str, found: dict[str, float]) -> None:
    row = "  ".join(f"{name} {speed:.1f}" for name, speed in found.items())
    share = f"   herd/tiktoken {found['herd'] / found['tiktoken']:.3f}" if "tiktoken" in found else ""
    print(f"{title:<18} {row} MB/s{share}", flush=True)


def train_speed(texts: list[str]) -> None:
    from herd import tokenizer

    size = sum(len(text.encode()) for text in texts)
    trainers: dict[str, Callable[[], object]] = {"herd": lambda: tokenizer.train(texts, 4096)}
    if importlib.util.find_spec("rustbpe"):
        import rustbpe

        from herd.tokenizer.specials import LLAMA3_PATTERN

        trainers["rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), 3840, pattern=LLAMA3_PATTERN)
    show("train 4096", speeds(trainers, size, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, help="a byte-level tokenizer to measure with")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    from herd import tokenizer

    code, english = standard_library(options.megabytes)
    ours = tokenizer.load(options.vocabulary) if options.vocabulary else tokenizer.train([*code, *english], 32_000)
    candidates = peers(ours)
    for title, texts in (("code", code), ("English", english)):
        ids = [ours.encode(text) for text in texts]
        for name, (encode, _) in candidates.items():
            if [encode(text) for text in texts] != ids:
                sys.exit(f"{name} gives other ids than herd")
        size = sum(len(text.encode()) for text in texts)
        print(
            f"{title}: {size / 1e6:.1f} MB, {size / sum(map(len, ids)):.2f} bytes per token, {ours.vocab_size:,} tokens"
        )
        show("  encode", speeds({n: run_all(e, texts) for n, (e, _) in candidates.items()}, size, options.repeats))
        show("  decode", speeds({n: run_all(d, ids) for n, (_, d) in candidates.items()}, size, options.repeats))
    train_speed(code)


if __name__ == "__main__":
    main()
