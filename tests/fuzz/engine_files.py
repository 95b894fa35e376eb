"""Damaged model files into the native engine: each one must load and run, or be refused with a HerdError.

    python tests/fuzz/engine_files.py --count 100000

Small GGUF files in every block format, and a safetensors model that is quantised while loading, get up to three
damages: most in the head, where sizes and offsets stand, the rest in the weights, where any bytes are possible (scales
that are infinite or no numbers). What loads computes the logits of a few tokens. Meant for a build with sanitisers
(`make sanitize`), in which a wrong access ends the process.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from herd.architecture import LlamaConfig, MoeConfig, tensor_shapes
from herd.checkpoint import save
from herd.engine.backend import BackendOptions, Span
from herd.engine.native_backend import open_backend
from herd.errors import HerdError

FORMATS = (
    "q4_0",
    "q5_1",
    "q8_0",
    "q4_1",
    "q2_k",
    "q3_k_m",
    "q4_k_m",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "int4_g32",
    "int4_g128",
    "bf16",
    "f32",
)
EXTREMES = (0, 1, 2, 3, 31, 33, 255, 65_535, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
CONFIG = LlamaConfig(
    dim=256, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=256, vocab_size=32, context_length=64
)
MIXTURE = LlamaConfig(
    dim=256,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    ffn_dim=256,
    vocab_size=32,
    context_length=64,
    moe=MoeConfig(n_experts=3, ffn_dim=256, top_k=2),
    nope_interval=2,
    attention_chunk=8,
    qk_norm=True,
    generation="llama4",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="damaged files to try")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    options = parser.parse_args()
    print(run(options.count, options.seed, report=sys.stderr.isatty()))


def run(count: int, seed: int, *, report: bool = False) -> str:
    """Try `count` damaged files; returns what happened in one line. Anything but a HerdError comes out as it is."""
    rng = random.Random(seed)
    ran = refused = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        subjects = _subjects(Path(name))
        for i in range(count):
            path, file, raw, head, quant = rng.choice(subjects)
            file.write_bytes(_damaged(raw, head, rng))
            try:
                _use(path, quant)
                ran += 1
            except HerdError:
                refused += 1
            if report and i % 500 == 0:
                sys.stderr.write(f"\r{i:,} files, {time.perf_counter() - start:.0f} s")
    return f"{count:,} damaged files: {ran:,} ran, {refused:,} were refused, {time.perf_counter() - start:.0f} s"


Subject = tuple[Path, Path, bytes, int, str | None]
"""What to load, the file in it that is damaged, its bytes, where its head ends, `quant`."""


def _subjects(folder: Path) -> list[Subject]:
    rng = np.random.default_rng(0)
    subjects: list[Subject] = []
    for config in (CONFIG, MIXTURE):
        weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
        for dtype in FORMATS:
            file = save(folder / f"{config.generation}-{dtype}.gguf", config, weights, format="gguf", dtype=dtype)
            raw = file.read_bytes()
            subjects.append((file, file, raw, raw.index(b"output_norm.weight") + 64, None))
        directory = save(folder / config.generation, config, weights, format="hf", dtype="bf16")
        file = directory / "model.safetensors"
        raw = file.read_bytes()
        subjects.append((directory, file, raw, 8 + int.from_bytes(raw[:8], "little"), "q4_0"))
    return subjects


def _damaged(raw: bytes, head: int, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(head if rng.random() < 0.6 else len(data))
        extreme = rng.choice(EXTREMES)
        match rng.choice(("flip", "flip", "overwrite", "overwrite", "noise", "insert", "cut", "end")):
            case "flip":
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case "overwrite":
                data[at : at + 8] = struct.pack("<Q", extreme)[: rng.choice((2, 4, 8))]
            case "noise":
                data[at : at + 64] = rng.randbytes(64)
            case "insert":
                data[at:at] = struct.pack("<Q", extreme)
            case "cut":
                del data[at : at + rng.randint(1, 64)]
            case "end" if rng.random() < 0.2:
                del data[at:]
        if not data:
            break
    return bytes(data)


def _use(path: Path, quant: str | None) -> None:
    backend = open_backend(BackendOptions(path=path, quant=quant, ctx=None, threads=1, kv="bf16"))
    try:
        reserved = backend.reserve(8)
        assert reserved is not None
        tokens = [token % backend.config.vocab_size for token in (1, 5, 2)]
        logits_NV = backend.step([Span(reserved[0], tokens, outputs=2)])
        assert logits_NV.shape == (2, backend.config.vocab_size)
    finally:
        backend.close()


if __name__ == "__main__":
    main()
