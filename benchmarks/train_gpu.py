"""Training speed on GPUs: Herd's trainer and plain PyTorch in torchtitan's manner, on the same shapes.

    python benchmarks/train_gpu.py [--shape 1b 3b 8b-width] [--precision bf16 float8] [--rounds 3] [--minutes 4.5]
    torchrun --nproc-per-node 8 benchmarks/train_gpu.py …
    python benchmarks/train_gpu.py --device cpu --shrink          the same code on small models, to try it

1b and 3b are Llama 3.2 whole, 8b-width are blocks of Llama 3.1 8B, as many as fit, with a vocabulary in proportion.
The default fits one GPU with 80 GB. A turn builds a system, takes a step to warm up and measures some; then it leaves
the GPU to the next one, so that each has all of the memory and rounds are interleaved. Compiled code stays. Figures are
medians over all steps of all rounds; peak memory is of whole steps. Every shape has its share of the minutes, after
which no further round begins, and after all of them nothing more is measured. The peer is benchmarks/train_gpu_peer.py.

FLOPs of a token are 6 per weight and causal attention (`herd.architecture.training_flops_per_token`). "MFU" divides by
the published bf16 peak of the card, "as torchtitan" also counts the half of attention that the mask leaves out, and
"of matmul" divides by the speed of one large bf16 product on this card. All of them stay relative to bf16 in float8.
Herd keeps its first and last block in bf16 there, as the Llama 3 paper does; the peer has all of them in float8.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from train_gpu_peer import PlainTrainer

from herd.architecture import LlamaConfig, releases, training_flops_per_token
from herd.model import Llama
from herd.train import Batch, TrainConfig, Trainer, matmul_peak, next_token_loss
from herd.train.world import OneRank, World, current_world


class Shape(NamedTuple):
    """A model, and the micro-batches of a rank: their number, their rows and the tokens of a row."""

    config: LlamaConfig
    seq: int
    rows: int = 1
    micro_batches: int = 4


SHAPES = {
    "1b": Shape(releases["llama3.2-1b"].config, 8192),
    "3b": Shape(releases["llama3.2-3b"].config, 4096),
    "8b-width": Shape(dataclasses.replace(releases["llama3.1-8b"].config, n_layers=10, vocab_size=32_768), 8192),
}
PUBLISHED = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "H200 NVL": 835e12,
    "H200": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 products a second, from NVIDIA's data sheets; the first name that the card's name contains."""
STEPS = 3
"""Measured steps of a turn."""
SYSTEMS = ("herd", "plain")


class Turn(NamedTuple):
    """What a turn measured on this rank; `compiled` is false where a system gave up compiling."""

    seconds: list[float]
    peak_bytes: int
    loss: float
    compiled: bool


def shrunk(shape: Shape) -> Shape:
    """The same kind of model, small enough for a laptop."""
    small = dataclasses.replace(
        shape.config, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=256
    )
    return Shape(small, 32, 1, 2)


def published_peak(name: str) -> float | None:
    """bf16 operations a second that the card's maker states, None for cards that are not in the table."""
    return next((peak for part, peak in PUBLISHED.items() if all(word in name for word in part.split())), None)


def attention_left_out(config: LlamaConfig, seq: int) -> float:
    """FLOPs of a token for the pairs that the causal mask hides: as many as for the visible ones."""
    return 6.0 * config.n_layers * config.n_heads * config.head_dim * seq


# --- the two systems ----------------------------------------------------------------------------------------------


class RandomRows:
    """Random tokens, in rows of one document or of several."""

    def __init__(self, shape: Shape, documents: int, rank: int) -> None:
        self._shape, self._documents, self._rank = shape, documents, rank

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of a step for this rank."""
        return [self._micro_batch(step, i) for i in range(self._shape.micro_batches)]

    def fingerprint(self) -> str:
        return "random"

    def _micro_batch(self, step: int, number: int) -> Batch:
        rows, seq = self._shape.rows, self._shape.seq
        generator = torch.Generator().manual_seed(hash((self._rank, step, number)))
        tokens = torch.randint(self._shape.config.vocab_size, (rows, seq + 1), generator=generator)
        cuts = torch.randint(1, seq, (rows, self._documents - 1), generator=generator)
        begins = torch.zeros(rows, seq, dtype=torch.int32).scatter_(1, cuts, 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], begins.cumsum(1, dtype=torch.int32), torch.ones(rows, seq))


@contextmanager
def herd(
    shape: Shape, precision: str, device: torch.device, options: argparse.Namespace
) -> Iterator[Callable[[int], tuple[float, bool]]]:
    """A step of Herd's own loop; on one GPU whole, on several sharded."""
    ranks = dist.get_world_size()
    parallel = {"shard": ranks > 1, "reshard": options.reshard, "recompute": options.recompute}
    rows = shape.rows * shape.micro_batches * ranks
    config = TrainConfig.model_validate(
        {"steps": 10**6, "seq_len": shape.seq, "batch_size": rows, "micro_batch": shape.rows, "precision": "bf16"}
        | {"compile": "on" if options.compile else "off", "device": device.type, "float8": precision == "float8"}
        | {"checkpoint_seconds": 0, "log_every": 10**6, "spike_factor": 0, "parallel": parallel}
    )
    world: World = current_world(config.parallel, device.type) if ranks > 1 else OneRank()
    with torch.device("meta"):
        model = Llama(shape.config)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    source = RandomRows(shape, options.documents, dist.get_rank())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, next_token_loss, source, config, folder, world=world)
        trainer.compile()

        def step(number: int) -> tuple[float, bool]:
            trainer.train_step()
            loss, weight = trainer.recent[-1]
            return loss / weight, trainer.blocks.active

        yield step


@contextmanager
def plain(
    shape: Shape, precision: str, device: torch.device, options: argparse.Namespace
) -> Iterator[Callable[[int], tuple[float, bool]]]:
    """A step of the peer's loop."""
    source = RandomRows(shape, 1, dist.get_rank())
    trainer = PlainTrainer(
        shape.config,
        shape.seq,
        device,
        init_device_mesh(device.type, (dist.get_world_size(),)),
        compiled=options.compile,
        float8=precision == "float8",
        recompute=options.recompute == "selective",
        reshard=options.reshard,
    )

    def step(number: int) -> tuple[float, bool]:
        return trainer.step([(batch.tokens_BS, batch.targets_BS) for batch in source.batch(number)]), options.compile

    yield step


# --- measuring ----------------------------------------------------------------------------------------------------


def take_turn(
    system: str, shape: Shape, precision: str, device: torch.device, options: argparse.Namespace
) -> Turn | str:
    """Build, warm up, measure, free; the reason where that fails."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with {"herd": herd, "plain": plain}[system](shape, precision, device, options) as step:
            step(0)
            seconds, loss, compiled = [], 0.0, False
            for number in range(1, STEPS + 1):
                dist.barrier()
                start = time.perf_counter()
                loss, compiled = step(number)
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        return Turn(seconds, torch.cuda.max_memory_allocated() if cuda else 0, loss, compiled)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # one system's failure is a row of the table
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def free(device: torch.device) -> None:
    """Give the memory of a turn back, if need be with the compiled code: it keeps the weights of one block."""
    gc.collect()
    if device.type != "cuda":
        return
    if torch.cuda.memory_allocated() > 2**32:
        torch._dynamo.reset()
        gc.collect()
    torch.cuda.empty_cache()


def agreed(flag: bool) -> bool:
    """Rank 0's answer, on all ranks."""
    answer = [flag]
    dist.broadcast_object_list(answer, 0)
    return answer[0]


def compare(
    name: str, device: torch.device, options: argparse.Namespace, share_ends: float, all_ends: float
) -> list[dict[str, Any]]:
    """One row for every system and precision on one shape."""
    shape = shrunk(SHAPES[name]) if options.shrink else SHAPES[name]
    if options.seq:
        shape = shape._replace(seq=options.seq)
    settings = [(system, precision) for precision in options.precision for system in SYSTEMS]
    turns: dict[tuple[str, str], list[Turn]] = {setting: [] for setting in settings}
    failures: dict[tuple[str, str], str] = {}
    for number in range(options.rounds):
        if number and not agreed(time.monotonic() < share_ends):
            break
        for setting in settings:
            if setting in failures:
                continue
            if not number and not agreed(time.monotonic() < all_ends):
                failures[setting] = "no time left: raise --minutes"
                continue
            found = take_turn(setting[0], shape, setting[1], device, options)
            free(device)
            if isinstance(found, str):
                failures[setting] = found
            else:
                turns[setting].append(found)
    if options.compile:
        torch._dynamo.reset()  # code for this shape is of no use to the next one, and its number is limited
    return [row(name, shape, setting, turns[setting], failures.get(setting)) for setting in settings]


def row(name: str, shape: Shape, setting: tuple[str, str], turns: list[Turn], failure: str | None) -> dict[str, Any]:
    """The figures of a system on one shape, of each rank."""
    head = {"shape": name, "precision": setting[1], "system": setting[0], "ranks": dist.get_world_size()}
    if failure is not None:
        return head | {"failed": failure}
    seconds = statistics.median([s for turn in turns for s in turn.seconds])
    rate = shape.rows * shape.micro_batches * shape.seq / seconds
    flops = training_flops_per_token(shape.config, shape.seq)
    return head | {
        "tokens_per_second": round(rate, 1),
        "flops_per_second": rate * flops,
        "flops_per_second_as_torchtitan": rate * (flops + attention_left_out(shape.config, shape.seq)),
        "peak_gib": round(max(turn.peak_bytes for turn in turns) / 2**30, 2),
        "loss": turns[-1].loss,
        "compiled": all(turn.compiled for turn in turns),
        "rounds": len(turns),
    }


def add_ratios(rows: list[dict[str, Any]], published: float | None, measured: float) -> None:
    """Utilisation of every row, and Herd's speed relative to the peer's."""
    speed = {(r["shape"], r["precision"], r["system"]): r.get("tokens_per_second") for r in rows}
    for r in rows:
        if "failed" in r:
            continue
        flops, all_flops = r["flops_per_second"], r["flops_per_second_as_torchtitan"]
        if published is not None:
            r["mfu"], r["mfu_as_torchtitan"] = flops / published, all_flops / published
        r["mfu_of_matmul"] = flops / measured
        if r["system"] == "herd" and (peer := speed[r["shape"], r["precision"], "plain"]):
            r["herd_is"] = round(r["tokens_per_second"] / peer, 3)


def show(result: dict[str, Any]) -> None:
    """The table."""
    peak = result["published_flops"]
    print(f"{result['device']} × {result['ranks']}, torch {torch.__version__}")
    print(f"bf16 peak: published {'unknown' if peak is None else f'{peak / 1e12:,.0f} TFLOP/s'}", end=", ")
    print(f"measured {result['matmul_flops'] / 1e12:,.2f} TFLOP/s\n")
    print("| shape | precision | system | tok/s a GPU | MFU | as torchtitan | of matmul | peak GiB | herd / plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        head = f"| {r['shape']} | {r['precision']} | {r['system']} |"
        if "failed" in r:
            print(f"{head} {r['failed']} | | | | | |")
            continue
        shares = " | ".join(
            f"{100 * r[key]:.1f} %" if key in r else "" for key in ("mfu", "mfu_as_torchtitan", "mfu_of_matmul")
        )
        ratio = f"{r['herd_is']:.2f}×" if "herd_is" in r else ""
        eager = "" if r["compiled"] else " (eager)"
        print(f"{head} {r['tokens_per_second']:,.0f}{eager} | {shares} | {r['peak_gib'] or ''} | {ratio} |")


def main() -> int:
    """Compare, print; 1 if a system failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=["bf16", "float8"], default=["bf16", "float8"])
    parser.add_argument("--rounds", type=int, help="default: 3, and 1 with --shrink")
    parser.add_argument("--minutes", type=float, default=4.5, help="after which nothing more is begun")
    parser.add_argument("--seq", type=int, help="tokens of a row, instead of the shape's")
    parser.add_argument("--documents", type=int, default=1, help="documents of a row, for Herd; the peer knows none")
    parser.add_argument("--recompute", choices=["none", "selective"], default="none")
    parser.add_argument("--reshard", action="store_true", help="gather weights again in the backward pass")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shrink", action="store_true", help="small models of the same kind")
    parser.add_argument("--json", action="store_true", help="all figures as JSON instead of a table")
    options = parser.parse_args()
    begin = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("nothing measured: there is no GPU; --device cpu --shrink tries the script", file=sys.stderr)
        return 0
    options.rounds = options.rounds or (1 if options.shrink else 3)
    if options.compile is None:
        options.compile = options.device == "cuda"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}.items():
        os.environ.setdefault(name, value)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    measured = matmul_peak(torch.bfloat16, device)
    rows = []
    for number, name in enumerate(options.shape, start=1):
        end = begin + 60 * options.minutes
        rows += compare(name, device, options, begin + (end - begin) * number / len(options.shape), end)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    add_ratios(rows, published_peak(name), measured)
    result = {"device": name, "ranks": dist.get_world_size(), "torch": torch.__version__, "rows": rows}
    result |= {"published_flops": published_peak(name), "matmul_flops": measured, "documents": options.documents}
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2)) if options.json else show(result)
    dist.destroy_process_group()
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
