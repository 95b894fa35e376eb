"""Real processes, really killed: SIGKILL at random instants, SIGTERM and SIGINT between steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# One process that has imported torch forks a fresh trainer for every attempt, so that an attempt costs no start-up.
DRIVER = '''
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from herd.architecture import LlamaConfig
from herd.corpus import pack_examples
from herd.model import Llama
from herd.train import PackedSource, TrainConfig, Trainer, next_token_loss

def train(out, **fields):
    rng = np.random.default_rng(0)
    examples = [((int(rng.integers(64)) + 5 * np.arange(20)) % 64, rng.random(20) < 0.8) for _ in range(60)]
    settings = dict(steps=60, seq_len=32, batch_size=4, micro_batch=2, lr=0.01, precision="fp32", compile="off",
                    checkpoint_seconds=0, checkpoint_every=3, log_every=1, average="ema", optimizer="muon")
    config = TrainConfig(**(settings | fields))
    source = PackedSource(pack_examples(examples, 32, 4, seed=2), config.micro_batch_rows)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, vocab_size=64))
    model.init_weights(0)
    result = Trainer(model, next_token_loss, source, config, out).fit()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    Path(out, "result.json").write_text(json.dumps({"sha256": digest, "loss": result.loss, "tokens": result.tokens}))

def attempt(out, kill_after=None):
    """Train in a child; True if it was killed before it was done."""
    child = os.fork()
    if child == 0:
        try:
            train(out)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False

def kills(out, wanted, seed):
    start = time.monotonic()
    attempt(out / "whole")
    whole = time.monotonic() - start
    draw, killed = random.Random(seed), 0
    while killed < wanted:
        if not attempt(out / "killed", draw.uniform(0.02, 2.5 * whole / wanted)):
            # Done before all kills: start over beside it.
            (out / "killed").rename(out / f"done-{killed}")
            continue
        killed += 1
    attempt(out / "killed")
    read = lambda name: json.loads((out / name / "result.json").read_text())
    done = [read(path.name) for path in out.glob("done-*")]
    steps = [json.loads(line)["step"] for line in (out / "killed" / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps({"whole": read("whole"), "killed": read("killed"), "done": done, "kills": killed, "steps": steps}))
'''


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", DRIVER + code, *arguments]


def _environment() -> dict[str, str]:
    # A forked child may use only one thread: OpenMP's threads do not survive a fork.
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _kill(out: Path, wanted: int, seed: int) -> dict[str, Any]:
    code = "kills(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    command = _python(code, str(out), str(wanted), str(seed))
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check(found: dict[str, Any], wanted: int) -> None:
    assert found["kills"] == wanted
    assert found["killed"] == found["whole"]
    assert all(done == found["whole"] for done in found["done"])
    assert found["steps"] == list(range(1, 61))


def test_kill_9_at_random_instants_ends_in_the_same_bits(tmp_path: Path) -> None:
    _check(_kill(tmp_path, 12, 0), 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_forty_times(tmp_path: Path, seed: int) -> None:
    _check(_kill(tmp_path, 40, seed), 40)


CLI = """
try:
    train(Path(sys.argv[1]), steps=int(sys.argv[2]), checkpoint_every=0)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_leave(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    steps = 10**6  # never done by itself
    command = _python(CLI, str(tmp_path), str(steps))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert f"{sent.name}: finishing this step and saving the state" in error
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    newest = max(path.name for path in (tmp_path / "state").iterdir())
    assert newest == f"step-{last:08d}"
