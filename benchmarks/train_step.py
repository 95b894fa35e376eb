"""Training speed: Herd against transformers and litgpt on the same shapes, in tokens a second of whole steps.

    python benchmarks/train_step.py [--shape 5M 5M-long 60M pocket] [--rounds 7] [--threads N] [--clock wall|cpu]

A step is forward, loss, backward, clipping to norm 1 and AdamW. Every system and setting runs in a process of its own
and steps only when it is its turn, so that rounds are interleaved; a turn is three steps, as one follows the other in
training, and figures are medians over rounds. Peers get every setting: eager and torch.compile of the whole model, fp32
and bf16 autocast; outside their default also the fused AdamW and, as Herd's trainer, an allocator that keeps freed
memory. Herd runs its `Trainer` with all its callbacks. litgpt is
skipped with the reason if it cannot be imported; `--litgpt-python` names another interpreter that has it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "5M": {"vocab": 4096, "dim": 256, "layers": 4, "heads": 8, "kv": 4, "ffn": 688, "batch": 4, "seq": 256},
    "5M-long": {"vocab": 4096, "dim": 256, "layers": 4, "heads": 8, "kv": 4, "ffn": 688, "batch": 8, "seq": 512},
    "60M": {"vocab": 32000, "dim": 512, "layers": 12, "heads": 8, "kv": 4, "ffn": 1376, "batch": 4, "seq": 256},
    # What recipes/pocket.yaml trains, in its batches.
    "pocket": {"vocab": 4096, "dim": 128, "layers": 4, "heads": 4, "kv": 4, "ffn": 384, "batch": 8, "seq": 512},
}
STEPS = 3
"""Steps in a turn."""
PEERS = ("transformers", "litgpt")
DEFAULT = ("transformers", "fp32", "eager")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(64 * 2**20)}
"""glibc's settings to keep freed memory: 8 % of a step on a 5M model."""
Setting = tuple[str, str, str]


def settings(peers: list[str]) -> list[Setting]:
    """(system, precision, mode) of everything that is compared."""
    rows: list[Setting] = [("herd", precision, "trainer") for precision in ("fp32", "bf16")]
    return rows + [
        (p, precision, mode) for p in peers for precision in ("fp32", "bf16") for mode in ("eager", "compile")
    ]


# --- in the worker processes --------------------------------------------------------------------------------------


def herd_step(shape: dict[str, int], precision: str, mode: str) -> Callable[[], None]:
    """A step of Herd's own loop."""
    import torch

    from herd.architecture import LlamaConfig
    from herd.model import Llama
    from herd.train import Batch, TrainConfig, Trainer, next_token_loss

    model = Llama(
        LlamaConfig(
            dim=shape["dim"],
            n_layers=shape["layers"],
            n_heads=shape["heads"],
            n_kv_heads=shape["kv"],
            head_dim=shape["dim"] // shape["heads"],
            ffn_dim=shape["ffn"],
            vocab_size=shape["vocab"],
            context_length=shape["seq"],
        )
    )
    model.init_weights(0)
    rows, length = shape["batch"], shape["seq"]

    class Random:
        def batch(self, step: int) -> list[Batch]:
            tokens = torch.randint(shape["vocab"], (rows, length + 1), generator=torch.Generator().manual_seed(step))
            documents, weights = torch.zeros(rows, length, dtype=torch.int32), torch.ones(rows, length)
            return [Batch(tokens[:, :-1], tokens[:, 1:], documents, weights)]

        def fingerprint(self) -> str:
            return "random"

    config = TrainConfig.model_validate(
        {"steps": 10**6, "seq_len": length, "batch_size": rows, "micro_batch": rows, "precision": precision}
        | {"compile": "on", "device": "cpu", "checkpoint_seconds": 0}
    )
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    trainer = Trainer(model, next_token_loss, Random(), config, directory.name)
    trainer.compile()
    return trainer.train_step


def peer_step(model: Any, loss_of: Callable[[Any, Any], Any], shape: dict[str, int], precision: str, mode: str) -> Any:
    """The usual loop around a peer's model."""
    import torch

    default = (precision, mode) == DEFAULT[1:]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **({} if default else {"fused": True})
    )
    forward = torch.compile(model) if mode == "compile" else model
    count = 0

    def step() -> None:
        nonlocal count
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randint(shape["vocab"], (shape["batch"], shape["seq"] + 1), generator=generator)
        count += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(forward, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(shape: dict[str, int], precision: str, mode: str) -> Callable[[], None]:
    """transformers' LlamaForCausalLM with its own loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["dim"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["ffn"],
        max_position_embeddings=shape["seq"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)

    def loss_of(forward: Any, tokens: Any) -> Any:
        # Labels are shifted inside; seq tokens go in, as everywhere.
        return forward(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss

    step: Callable[[], None] = peer_step(model, loss_of, shape, precision, mode)
    return step


def litgpt_step(shape: dict[str, int], precision: str, mode: str) -> Callable[[], None]:
    """litgpt's GPT in its Llama configuration with its chunked loss, as its pretraining script calls them."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(0)
    config = Config(
        name="bench",
        block_size=shape["seq"],
        padded_vocab_size=shape["vocab"],
        vocab_size=shape["vocab"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_query_groups=shape["kv"],
        n_embd=shape["dim"],
        head_size=shape["dim"] // shape["heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["ffn"],
        rope_base=500_000,
    )
    model = GPT(config)

    def loss_of(forward: Any, tokens: Any) -> Any:
        return chunked_cross_entropy(forward(tokens[:, :-1]).float(), tokens[:, 1:].contiguous(), chunk_size=0)

    step: Callable[[], None] = peer_step(model, loss_of, shape, precision, mode)
    return step


def work(shape_name: str, system: str, precision: str, mode: str, threads: int, clock: str) -> None:
    """Worker: build, warm up, say ready; then a turn per line on stdin, its seconds per step on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies
    if system == "herd":
        # Before torch allocates: part of what is measured.
        from herd.train.memory import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(threads)
    now = time.process_time if clock == "cpu" else time.perf_counter
    make = {"herd": herd_step, "transformers": transformers_step, "litgpt": litgpt_step}[system]
    step = make(SHAPES[shape_name], precision, mode)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    print(json.dumps({"first_step_seconds": first}), file=replies)
    for _ in sys.stdin:
        start = now()
        for _ in range(STEPS):
            step()
        print(json.dumps({"seconds": (now() - start) / STEPS}), file=replies)


# --- in the coordinating process ----------------------------------------------------------------------------------


class Worker:
    """A process that steps on request."""

    def __init__(self, shape: str, setting: Setting, options: argparse.Namespace) -> None:
        python = options.litgpt_python if setting[0] == "litgpt" else sys.executable
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, __file__, "--worker", shape, *setting, str(options.threads), options.clock]
        # What Herd's trainer asks of the allocator at run time; peers can be given it by the environment.
        allocator = {} if setting[0] == "herd" or setting[1:] == DEFAULT[1:] else KEEP_MEMORY
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | allocator,
        )
        self.first = self._reply()["first_step_seconds"]

    def turn(self) -> float:
        """Seconds per step of one turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._reply()["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(last)
        reply: dict[str, Any] = json.loads(line)
        return reply


def compare(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each setting, with ratios of Herd's speed to it."""
    workers: dict[Setting, Worker] = {}
    rows: list[dict[str, Any]] = []
    for setting in settings(options.peers):
        system, precision, mode = setting
        row = {"shape": shape, "system": system, "precision": precision, "mode": mode}
        try:
            workers[setting] = Worker(shape, setting, options)
            rows.append(row)
        except RuntimeError as error:
            if system == "herd":
                raise
            rows.append(row | {"skipped": str(error)})
    times: dict[Setting, list[float]] = {setting: [] for setting in workers}
    for _ in range(options.rounds):
        for setting, worker in workers.items():
            times[setting].append(worker.turn())
    tokens = SHAPES[shape]["batch"] * SHAPES[shape]["seq"]
    for row in rows:
        setting = (row["system"], row["precision"], row["mode"])
        if setting in times:
            row["tokens_per_second"] = round(tokens / statistics.median(times[setting]))
            row["fastest"] = round(tokens / min(times[setting]))
            row["first_step_seconds"] = round(workers[setting].first, 1)
            workers[setting].close()
    speed = {(r["system"], r["precision"], r["mode"]): r["tokens_per_second"] for r in rows if "tokens_per_second" in r}
    for row in rows:
        if "tokens_per_second" in row and row["system"] != "herd":
            for precision in ("fp32", "bf16"):
                row[f"herd_{precision}_is"] = round(speed["herd", precision, "trainer"] / row["tokens_per_second"], 2)
    return rows


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table and the two ratios that matter."""
    shape = SHAPES[rows[0]["shape"]]
    facts = ", ".join(f"{name} {value}" for name, value in shape.items())
    print(f"\n### {rows[0]['shape']}: {facts}; {options.threads} threads, {options.clock} clock\n")
    print("| system | precision | mode | tok/s median | best | first step | herd fp32 / it | herd bf16 / it |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        head = f"| {row['system']} | {row['precision']} | {row['mode']} |"
        if "skipped" in row:
            print(f"{head} skipped: {row['skipped']} | | | | |")
            continue
        ratios = " | ".join(f"{row[k]:.2f}×" if k in row else "" for k in ("herd_fp32_is", "herd_bf16_is"))
        times = f"{row['tokens_per_second']:,} | {row['fastest']:,} | {row['first_step_seconds']} s"
        print(f"{head} {times} | {ratios} |")
    ours = max(row["tokens_per_second"] for row in rows if row["system"] == "herd")
    theirs = [row for row in rows if row["system"] != "herd" and "tokens_per_second" in row]
    for peer in options.peers:
        own = [row for row in theirs if row["system"] == peer]
        if own:
            default = next(row for row in own if (row["precision"], row["mode"]) == DEFAULT[1:])
            best = max(own, key=lambda row: row["tokens_per_second"])
            print(
                f"\nherd's best is {ours / default['tokens_per_second']:.2f}× {peer}'s default and "
                f"{ours / best['tokens_per_second']:.2f}× its best ({best['precision']}, {best['mode']})"
            )


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--litgpt-python", default=sys.executable, help="interpreter that can import litgpt")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    options = parser.parse_args()
    rows = []
    for shape in options.shape:
        rows += (group := compare(shape, options))
        if not options.json:
            show(group, options)
            sys.stdout.flush()
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:6], int(sys.argv[6]), sys.argv[7])  # type: ignore[misc]
    else:
        main()
