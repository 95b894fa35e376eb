"""Two ranks over gloo give the gradients, weights and metrics of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from herd.architecture import LlamaConfig
from herd.corpus import pack_examples
from herd.model import Llama
from herd.train import budget, PackedSource, TrainConfig, Trainer, next_token_loss

def train(out, steps, limited=False):
    rng = np.random.default_rng(0)
    examples = [((int(rng.integers(64)) + 5 * np.arange(20)) % 64, rng.random(20) < rng.random()) for _ in range(90)]
    config = TrainConfig(steps=8, seq_len=32, batch_size=8, micro_batch=3, lr=0.01, precision="fp32", compile="off",
                         checkpoint_seconds=0, checkpoint_every=4, log_every=1)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, vocab_size=64))
    model.init_weights(0)
    source = PackedSource(pack_examples(examples, 32, 8, seed=2), config.micro_batch_rows)
    limits = []
    if limited:
        # Rank 1 has another clock and other speed, by which nothing would fit.
        rank = dist.get_rank()
        budget.step_seconds = lambda trainer: 1.0 + 1000 * rank
        config = config.model_copy(update={"steps": 500})
        limits = [budget.TimeLimit(15.5, Path(out) / "plan.json", started=0.0)]
        budget.MARGIN = 0.9
    trainer = Trainer(model, next_token_loss, source, config, out, limits)
    loss, norm, tokens, weight = trainer.gradients(2)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    trainer.optimizer.zero_grad()
    if limited:
        trainer.compile()
        trainer._resume()
        limits[0]._started = time.monotonic() - 1000 * rank  # what building took is not what is tried here
        for callback in trainer.callbacks:
            callback.on_start(trainer)
        plan = trainer.total_steps
        for _ in range(6):
            trainer.train_step()
        return {"plan": [plan, trainer.total_steps]}
    if steps == 8:
        trainer.fit()
    else:
        trainer._resume()
        for _ in range(steps):
            trainer.train_step()
        trainer.save()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"facts": [loss, norm, tokens, weight], "gradients": gradients, "weights": weights}

def ranks(out, steps, result, limited=False):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                init = f"file://{out}.store"
                dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
                torch.save(train(out, steps, limited), f"{result}.{rank}")
                dist.destroy_process_group()
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [torch.load(f"{result}.{rank}", weights_only=True) for rank in range(2)]

out = Path(sys.argv[1])
two = ranks(out / "two", 8, out / "result")
# Half with two ranks, the rest with one.
ranks(out / "mixed", 4, out / "half")
limited = ranks(out / "limited", 0, out / "limits", limited=True)
mixed = train(out / "mixed", 8)
one = train(out / "one", 8)
worst = lambda a, b: (a - b).abs().max().item()
print(json.dumps({
    "facts": [one["facts"], two[0]["facts"], two[1]["facts"]],
    "plans": [rank["plan"] for rank in limited],
    "size": one["gradients"].abs().max().item(),
    "gradients": [worst(one["gradients"], rank["gradients"]) for rank in two],
    "ranks": worst(two[0]["weights"], two[1]["weights"]),
    "weights": worst(one["weights"], two[0]["weights"]),
    "mixed": worst(one["weights"], mixed["weights"]),
    "losses": [[json.loads(line)["loss"] for line in open(out / name / "metrics.jsonl")] for name in ("one", "two")],
}))
"""


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one, *two = found["facts"]
    assert all(rank == pytest.approx(one, rel=1e-5) for rank in two)
    first, second = found["plans"]
    assert first == second and first[0] in (12, 13) and first[1] > 13, (
        "rank 0's clock counts, its speed was better than planned"
    )
    assert max(found["gradients"]) < 1e-5 * found["size"]
    assert found["ranks"] == 0.0
    # Sums in another order: AdamW's first steps magnify the last bits of tiny gradients, no more than that.
    assert found["weights"] < 2e-3 and found["mixed"] < 2e-3
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-4)
