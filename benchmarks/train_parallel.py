"""What several ranks cost on one machine: speed against one process, memory by context ranks, speed by length.

    python benchmarks/train_parallel.py [--only speed memory length] [--rounds 7] [--shape 5M-long] [--json]

speed: whole steps of the trainer with two ranks of one thread each, split along every axis, and one process with two
threads. All are started at once and step only when it is their turn; figures are medians over rounds of three steps,
and the ratio is to the one process. memory: what each token of a row adds at the peak, on 1, 2 and 4 context ranks:
rows of 16,384 tokens less such of 8,192, from where on the tiles of attention, which do not grow, are whole on all
ranks. length: tokens a second of one process as rows get longer, beside the arithmetic that a token takes
(`training_flops_per_token`); rows hold one document each. On Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_step import SHAPES

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, 2 threads": (1, {}),
    "dp 2": (2, {}),
    "fsdp 2": (2, {"shard": True}),
    "tp 2": (2, {"tp": 2}),
    "cp 2": (2, {"cp": 2}),
    "pp 2": (2, {"pp": 2}),
}
STEPS = 3
SMALL = {"vocab": 1024, "dim": 256, "layers": 4, "heads": 4, "kv": 2, "ffn": 704, "batch": 1}
MEMORY = {**SMALL, "layers": 2}
MEMORY_LENGTHS = (8192, 16384)
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""So that memory that a process has freed is not counted as its own."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def build(shape: dict[str, int], parallel: dict[str, Any], micro_batch: int, folder: str) -> Any:
    """A trainer over random rows of one document each."""
    import torch

    from herd.architecture import LlamaConfig
    from herd.model import Llama
    from herd.train import Batch, TrainConfig, Trainer, next_token_loss
    from herd.train.world import current_world

    rows, length = shape["batch"], shape["seq"]
    config = TrainConfig.model_validate(
        {"steps": 10**6, "seq_len": length, "batch_size": rows, "micro_batch": micro_batch, "precision": "fp32"}
        | {"compile": "off", "device": "cpu", "checkpoint_seconds": 0, "parallel": parallel}
    )
    world = current_world(config.parallel)

    class Random:
        def batch(self, step: int) -> list[Batch]:
            tokens = torch.randint(shape["vocab"], (rows, length + 1), generator=torch.Generator().manual_seed(step))
            whole = (
                tokens[:, :-1],
                tokens[:, 1:],
                torch.zeros(rows, length, dtype=torch.int32),
                torch.ones(rows, length),
            )
            share = rows // world.data_size
            mine = [x[world.data_rank * share : (world.data_rank + 1) * share].split(micro_batch) for x in whole]
            return [Batch(*parts) for parts in zip(*mine, strict=True)]

        def fingerprint(self) -> str:
            return "random"

    model = Llama(
        LlamaConfig(
            dim=shape["dim"],
            n_layers=shape["layers"],
            n_heads=shape["heads"],
            n_kv_heads=shape["kv"],
            head_dim=shape["dim"] // shape["heads"],
            ffn_dim=shape["ffn"],
            vocab_size=shape["vocab"],
            context_length=length,
        )
    )
    model.init_weights(0)
    return Trainer(model, next_token_loss, Random(), config, folder, world=world)


def rank_main(options: argparse.Namespace) -> None:
    """One rank: ready, then a turn for each line on standard input of rank 0; or one measurement of memory."""
    import torch

    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(max(1, 2 // ranks) if options.task == "speed" else 1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    shape = SHAPES[options.shape] if options.task == "speed" else {**MEMORY, "seq": options.length}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(shape, json.loads(options.parallel), max(1, shape["batch"] // 4), folder)
        if options.task == "memory":
            before = _resident()
            trainer.train_step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"before": before, "peak": peak}), flush=True)
            return
        trainer.train_step()
        print("ready", flush=True)
        for line in sys.stdin if rank == 0 else iter(lambda: "turn", None):
            go = torch.tensor(0 if line.strip() == "end" else 1)
            if ranks > 1:
                torch.distributed.broadcast(go, 0)
            if not go.item():
                break
            start = time.perf_counter()
            for _ in range(STEPS):
                trainer.train_step()
            if rank == 0:
                print((time.perf_counter() - start) / STEPS, flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(
    task: str, ranks: int, parallel: dict[str, Any], shape: str, port: int, length: int = 0
) -> list[subprocess.Popen[str]]:
    """The ranks of a run."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--task",
        task,
        "--parallel",
        json.dumps(parallel),
        "--shape",
        shape,
        "--length",
        str(length),
    ]
    base = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **base, "RANK": str(rank), "OMP_NUM_THREADS": str(max(1, 2 // ranks))}
            | (FREED_AT_ONCE if task == "memory" else {}),
        )
        for rank in range(ranks)
    ]


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every layout, and the ratio to one process."""
    runs = {name: start("speed", *layout, options.shape, 29610 + i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    for ranks in runs.values():
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline().strip() == "ready"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, ranks in runs.items():
            first = ranks[0]
            assert first.stdin is not None and first.stdout is not None
            first.stdin.write("turn\n")
            first.stdin.flush()
            seconds[name].append(float(first.stdout.readline()))
    for ranks in runs.values():
        ranks[0].communicate("end\n")
        for rank in ranks[1:]:
            rank.wait()
    shape = SHAPES[options.shape]
    tokens = shape["batch"] * shape["seq"]
    base = statistics.median(next(iter(seconds.values())))
    return {
        name: {
            "tokens_per_second": round(tokens / statistics.median(found)),
            "ratio": round(base / statistics.median(found), 3),
        }
        for name, found in seconds.items()
    }


def memory() -> dict[str, Any]:
    """KiB at a rank's peak for a token of the row, on the fullest rank, and the share of one process's."""
    result: dict[str, Any] = {}
    for cp in (1, 2, 4):
        for kind in ("gather", "ring") if cp > 1 else ("gather",):
            parallel = {"cp": cp, "context": kind} if cp > 1 else {}
            peaks = []
            for tokens in MEMORY_LENGTHS:
                ranks = start("memory", cp, parallel, "5M", 29700 + cp, tokens)
                found = [json.loads(rank.communicate()[0]) for rank in ranks]
                peaks.append(max(rank["peak"] - rank["before"] for rank in found))
            each = (peaks[1] - peaks[0]) / (MEMORY_LENGTHS[1] - MEMORY_LENGTHS[0]) / 1024
            first = result["cp 1"]["kib_per_token"] if result else each
            name = f"cp {cp}" + (f" {kind}" if cp > 1 else "")
            result[name] = {"kib_per_token": each, "share": each / first, "peak_mib": peaks[1] / 2**20}
    return result


def length() -> dict[str, Any]:
    """Tokens a second by length, and the arithmetic of a token relative to the shortest row's."""
    import torch

    from herd.architecture import training_flops_per_token

    torch.set_num_threads(2)
    result: dict[str, Any] = {}
    for tokens in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            rows = max(1, 4096 // tokens)
            trainer = build({**SMALL, "seq": tokens, "batch": rows}, {}, rows, folder)
            trainer.train_step()
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                trainer.train_step()
                times.append(time.perf_counter() - begin)
            rate = rows * tokens / statistics.median(times)
            flops = training_flops_per_token(trainer.model.config, tokens, 1.0)
            result[str(tokens)] = {
                "tokens_per_second": round(rate),
                "gflop_per_token": flops / 1e9,
                "gflops": rate * flops / 1e9,
            }
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=["speed", "memory", "length"], default=["speed", "memory", "length"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", default="5M-long", choices=list(SHAPES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", choices=["speed", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--parallel", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        rank_main(options)
        return
    result: dict[str, Any] = {}
    if "speed" in options.only:
        result["speed"] = speed(options)
    if "memory" in options.only:
        result["memory_mib"] = memory()
    if "length" in options.only:
        result["length"] = length()
    if options.json:
        print(json.dumps(result))
        return
    for title, rows in result.items():
        print(f"\n{title}")
        for name, values in rows.items():
            shown = ", ".join(f"{k} {v:,.3g}" for k, v in values.items()) if isinstance(values, dict) else f"{values:,}"
            print(f"  {name:24} {shown}")


if __name__ == "__main__":
    main()
