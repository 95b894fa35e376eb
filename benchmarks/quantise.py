"""Quantisation: Herd's search against llama.cpp's quantiser on the same tensors: error and speed of every format.

    python benchmarks/quantise.py [--library libggml-base.so] [--model CHECKPOINT] [--threads N] [--json]

Tensors are normal and heavy-tailed (Student's t with 4 degrees of freedom) random weights, and those of `--model` if
given. Errors are root mean squares relative to the weights'. llama.cpp's quantiser is called in its own library, that
of llama-cpp-python unless `--library` names another; without either Herd is measured alone. It uses one thread, so
times are per thread, the median of 5 interleaved runs.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from herd.checkpoint import open_checkpoint
from herd.checkpoint.blocks import dequantize, quantize
from herd.checkpoint.numbers import BLOCKS

ROWS, COLUMNS = 512, 4096
Quantiser = Callable[[str, np.ndarray], bytes]


def library(name: str | None) -> ctypes.CDLL | None:
    """llama.cpp's tensor library."""
    if name is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            return None
        name = str(next(Path(found.origin).parent.glob("lib/libggml-base.*"), ""))
    return ctypes.CDLL(name) if name else None


def peer(lib: ctypes.CDLL) -> Quantiser:
    """`ggml_quantize_chunk` without an importance matrix."""
    chunk = lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(type_name: str, weights: np.ndarray) -> bytes:
        block = BLOCKS[type_name]
        out = np.empty(weights.size // block.weights * block.bytes, np.uint8)
        code = int(gguf.GGMLQuantizationType[type_name.upper()])
        chunk(code, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, None)
        return out.tobytes()

    return run


def tensors(model: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 matrix."""
    rng = np.random.default_rng(0)
    yield "normal", rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) * np.float32(0.02)
    yield "heavy", rng.standard_t(4, (ROWS, COLUMNS)).astype(np.float32) * np.float32(0.02)
    if model is not None:
        with open_checkpoint(model) as checkpoint:
            wanted = [name for name in checkpoint if len(checkpoint.shape(name)) == 2 and "layers.0" in name]
            parts = [np.asarray(checkpoint[name], np.float32).reshape(-1) for name in wanted]
        flat = np.concatenate(parts)
        yield "trained", flat[: len(flat) // 256 * 256].reshape(-1, 256)


def relative_error(type_name: str, weights: np.ndarray, data: bytes) -> float:
    """Root of the mean squared error over that of the weights."""
    error = dequantize(type_name, data).reshape(weights.shape).astype(np.float64) - weights
    return float(np.sqrt(np.mean(error**2) / np.mean(weights.astype(np.float64) ** 2)))


def measure(type_name: str, weights: np.ndarray, run: dict[str, Quantiser]) -> dict[str, Any]:
    """Error and median seconds of each quantiser."""
    data = {name: function(type_name, weights) for name, function in run.items()}
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(5):
        for name, function in run.items():
            start = time.perf_counter()
            function(type_name, weights)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "error": relative_error(type_name, weights, data[name]),
            "weights_per_second": weights.size / statistics.median(seconds[name]),
        }
        for name in run
    }


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libggml-base.so of a llama.cpp build")
    parser.add_argument("--model", type=Path, help="a checkpoint whose first layer is measured as well")
    parser.add_argument("--threads", type=int, default=1, help="of Herd's quantiser")
    parser.add_argument("--formats", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    run: dict[str, Quantiser] = {"herd": lambda name, weights: quantize(name, weights, threads=options.threads)}
    lib = library(options.library)
    if lib is not None:
        run["llama.cpp"] = peer(lib)
    rows = []
    for label, weights in tensors(options.model):
        for type_name in options.formats:
            rows.append({"tensor": label, "format": type_name, **measure(type_name, weights, run)})
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| tensor | format | error of herd | llama.cpp | ratio | M weights/s, herd | llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ours, theirs = row["herd"], row.get("llama.cpp")
        line = f"| {row['tensor']} | {row['format']} | {ours['error']:.5f} |"
        line += f" {theirs['error']:.5f} | {ours['error'] / theirs['error']:.3f} |" if theirs else " | |"
        line += f" {ours['weights_per_second'] / 1e6:.1f} |"
        print(line + (f" {theirs['weights_per_second'] / 1e6:.1f} |" if theirs else " |"))


if __name__ == "__main__":
    main()
