"""Measured matrix-product speed of this machine: the denominator of MFU, and how far single shapes are from it.

    python benchmarks/matmul_peak.py [--json]

"peak" is what `herd.train` divides by (the best of several runs); rows are medians of x @ w.T for the products of
small models: tokens × width × width.
"""

from __future__ import annotations

import argparse
import json

import torch

from herd.train import matmul_peak
from herd.train.memory import keep_freed_memory
from herd.train.peak import matmul_rate

SHAPES = [
    (4096, 256, 256),
    (4096, 256, 688),
    (4096, 688, 256),
    (1024, 256, 4096),
    (4096, 512, 1376),
    (2048, 2048, 2048),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows = [{"shape": "peak"} | {name: round(matmul_peak(dtype) / 1e9, 1) for name, dtype in types.items()}]
    for m, k, n in SHAPES:
        speeds = {name: round(matmul_rate(m, k, n, dtype) / 1e9, 1) for name, dtype in types.items()}
        rows.append({"shape": f"{m} x {k} x {n}"} | speeds)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, GFLOP/s\n")
    print("| product | fp32 | bf16 |\n|---|---|---|")
    for row in rows:
        print(f"| {row['shape']} | {row['fp32']} | {row['bf16']} |")


if __name__ == "__main__":
    main()
