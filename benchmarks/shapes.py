"""Models to measure speed on: random weights in a given shape, as GGUF files of several formats.

    python benchmarks/shapes.py --folder FOLDER [--shape 1b|15m|MODEL] [--formats q4_0 q8_0 …]

`1b` is Llama 3.2 1B, `15m` a small model of the Llama 2 generation; a path to a model converts that one. Files that are
there already stay as they are. In memory is one tensor at a time. The format `hf` is a directory in Hugging Face's form
with bfloat16 weights.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from herd import checkpoint
from herd.architecture import LlamaConfig, releases, tensor_shapes

FORMATS = ("q4_0", "q8_0", "q4_k_m", "q6_k", "bf16")
SHAPES = {
    "1b": releases["llama3.2-1b"].config,
    "15m": LlamaConfig(
        dim=288,
        n_layers=6,
        n_heads=6,
        n_kv_heads=6,
        head_dim=48,
        ffn_dim=768,
        vocab_size=32_000,
        context_length=8192,
        rope_theta=10_000.0,
        tied_embeddings=True,
        generation="llama2",
    ),
}


def make(shape: str, format_name: str, folder: Path) -> Path:
    """The file of a shape, or of a model's path, in one format; it is written where it is missing."""
    kind, dtype, end = ("hf", "bf16", "") if format_name == "hf" else ("gguf", format_name, ".gguf")
    path = folder / f"{re.sub('[^A-Za-z0-9.]+', '-', shape).strip('-')}-{format_name}{end}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if shape in SHAPES:
        config = SHAPES[shape]
        checkpoint.save(path, config, weights(config), format=kind, dtype=dtype, label=path.name)
    else:
        checkpoint.convert(checkpoint.resolve(shape), path, to=kind, dtype=dtype)
    return path


def weights(config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Canonical names and values: normal with deviation 0.02, as an untrained model's."""
    rng = np.random.default_rng(0)
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            yield name, np.ones(shape, np.float32)
        else:
            values = rng.standard_normal(shape, np.float32)
            values *= np.float32(0.02)
            yield name, values


def main() -> None:
    """Write, print the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are kept")
    parser.add_argument("--shape", default="1b", help=f"{', '.join(SHAPES)}, or a path to a model")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help=f"default: {' '.join(FORMATS)}")
    options = parser.parse_args()
    for format_name in options.formats:
        path = make(options.shape, format_name, options.folder)
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB", flush=True)


if __name__ == "__main__":
    main()
