"""Generation speed of `herd.LLM`, on either backend, next to transformers' `generate`, same random weights, greedy.

Both run float32 on the same threads; rounds are interleaved and medians compared, and both must give the same tokens.

    python benchmarks/generate_vs_transformers.py [--backend native|torch] [--rounds 5] [--threads 2] [--shapes 5m,60m]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from herd.architecture import LlamaConfig

SHAPES = {
    "5m": LlamaConfig(
        dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=688, vocab_size=4096, context_length=1024
    ),
    "60m": LlamaConfig(
        dim=512, n_layers=12, n_heads=8, n_kv_heads=4, head_dim=64, ffn_dim=1408, vocab_size=16384, context_length=1024
    ),
}


@dataclass(frozen=True)
class Task:
    """`n_prompts` prompts of ragged lengths, `new_tokens` each; the peer gets them in batches of `peer_batch`."""

    name: str
    n_prompts: int
    prompt_tokens: tuple[int, int]
    new_tokens: int
    peer_batch: int


TASKS = [
    Task("500 exercises x 12 tokens", 500, (20, 60), 12, 64),
    Task("64 prompts x 64 tokens", 64, (20, 120), 64, 64),
    Task("1 prompt x 128 tokens", 1, (64, 64), 128, 1),
    Task("1 prompt of 900 tokens", 1, (900, 900), 1, 1),
]


def main() -> None:
    arguments = _arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    results = []
    for shape in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            _write_model(SHAPES[shape], Path(folder))
            for task in TASKS:
                results.append({"shape": shape, **_compare(task, SHAPES[shape], folder, arguments)})
                row = results[-1]
                print(
                    f"{shape:>4}  {row['task']:<28} herd {row['herd_s']:8.3f} s  transformers "
                    f"{row['transformers_s']:8.3f} s  ratio {row['ratio']:5.2f}  same tokens {row['same_tokens']}"
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


def _compare(task: Task, config: LlamaConfig, folder: str, arguments: argparse.Namespace) -> dict[str, object]:
    rng = random.Random(7)
    prompts = [
        [rng.randrange(config.vocab_size) for _ in range(rng.randint(*task.prompt_tokens))]
        for _ in range(task.n_prompts)
    ]
    ours, theirs = _herd(folder, arguments, task), _transformers(folder, arguments.threads, task)
    runners: list[Callable[[list[list[int]]], list[list[int]]]] = [ours, theirs]
    same = _agreement(ours(prompts), theirs(prompts))  # also the warm-up
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.rounds):
        for run, measured in zip(runners, seconds, strict=True):
            begun = time.perf_counter()
            run(prompts)
            measured.append(time.perf_counter() - begun)
    herd_s, transformers_s = (statistics.median(measured) for measured in seconds)
    return {
        "task": task.name,
        "herd_s": herd_s,
        "transformers_s": transformers_s,
        "ratio": transformers_s / herd_s,
        "same_tokens": same,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
    }


def _herd(folder: str, arguments: argparse.Namespace, task: Task) -> Callable[[list[list[int]]], list[list[int]]]:
    import herd

    llm = herd.LLM(folder, threads=arguments.threads, kv="f32", backend=arguments.backend)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        completions = llm.generate(prompts, max_tokens=task.new_tokens, temperature=0.0, ignore_eos=True)
        return [completion.token_ids for completion in completions]

    return run


def _transformers(folder: str, threads: int, task: Task) -> Callable[[list[list[int]]], list[list[int]]]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> list[list[int]]:
        # sorted by length, so that padding costs the peer as little as possible
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, list[int]] = {}
        for batch in _batches(order, task.peer_batch):
            longest = max(len(prompts[i]) for i in batch)
            padded = [[0] * (longest - len(prompts[i])) + prompts[i] for i in batch]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            ids = model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=task.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            answers.update(zip(batch, ids[:, longest:].tolist(), strict=True))
        return [answers[i] for i in range(len(prompts))]

    return run


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return f"{same}/{len(ours)}"


def _write_model(config: LlamaConfig, folder: Path) -> None:
    from herd import checkpoint, tokenizer
    from herd.model import Llama, state_arrays

    model = Llama(config)
    model.init_weights(0)
    text = [path.read_text(errors="replace") for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))]
    vocabulary = tokenizer.train(text, config.vocab_size)
    checkpoint.save(folder / "model", config, state_arrays(model), format="hf", dtype="f32", tokenizer=vocabulary)
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", default="native", choices=("native", "torch"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", default="5m,60m")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
