"""How fast exercises are made and text is scored. Prints seconds and rates; peers do not offer either.

    python benchmarks/evaluation_speed.py [--kilobytes 300] [--exercises 20000] [--questions 200]

The model is random and of about the pocket recipe's size: speed does not depend on what it has learnt. CPU seconds
are those of all cores together: the figure to trust on a machine that does other things.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

from herd import LLM, checkpoint, model, tokenizer
from herd.align.exercises import generate
from herd.architecture import LlamaConfig, parameter_count
from herd.evaluate import bits_per_byte, compressors, exact_match

SHAPE = LlamaConfig(
    dim=256,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    ffn_dim=688,
    vocab_size=4096,
    context_length=1024,
    tied_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kilobytes", type=int, default=300)
    parser.add_argument("--exercises", type=int, default=20_000)
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()

    start = _now()
    generate(0, options.exercises, "train")
    _show("exercises made", options.exercises, "exercises", start)

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    vocabulary = tokenizer.train(texts, SHAPE.vocab_size)
    scored: list[str] = []
    while sum(map(len, scored)) < 1000 * options.kilobytes:
        scored.append(texts[len(scored)])
    size = sum(len(text.encode()) for text in scored)

    start = _now()
    compressors(scored)
    _show("xz, zstd, bzip2", size / 1000, "kB", start)

    with tempfile.TemporaryDirectory() as folder:
        llama = model.Llama(SHAPE)
        llama.init_weights(0)
        checkpoint.save(Path(folder) / "m", SHAPE, model.state_arrays(llama), format="hf", tokenizer=vocabulary)
        print(f"model of {parameter_count(SHAPE):,} parameters, context {SHAPE.context_length}")
        with LLM(Path(folder) / "m") as llm:
            start = _now()
            bits_per_byte(llm, scored)
            _show("bits per byte, half a context repeated", size / 1000, "kB", start)
            questions = generate(1, options.questions, "heldout")
            start = _now()
            exact_match(llm, questions, max_tokens=32)
            _show("exact match, no answer ends before 32 tokens", options.questions, "questions", start)


Clock = tuple[float, float]  # seconds on the wall, CPU seconds


def _now() -> Clock:
    return time.perf_counter(), time.process_time()


def _show(what: str, count: float, unit: str, start: Clock) -> None:
    wall, cpu = (now - then for now, then in zip(_now(), start, strict=True))
    print(f"{what}: {count:,.0f} {unit} in {wall:.1f} s ({cpu:.1f} CPU s), {count / wall:,.0f} {unit}/s", flush=True)


if __name__ == "__main__":
    main()
