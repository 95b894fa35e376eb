"""metrics.jsonl tells one story, whatever happened; measurements are what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.errors import UsageError
from herd.train.budget import TimeLimit
from herd.train.callbacks import Callback, StepRecord
from herd.train.memory import keep_freed_memory, memory_bytes
from herd.train.metrics import MetricsFile, _clock
from herd.train.peak import Peak, matmul_peak
from herd.train.trainer import Trainer
from tests.train.parallel.cases import Case, trainer


def test_rewind_drops_later_and_broken_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(3)  # nothing there yet
    for step in range(1, 6):
        file.write(step, {"loss": 1 / step})
    with open(file.path, "a") as stream:
        stream.write('{"step": 2, "lo')
    file.rewind(3)
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [
        {"step": step, "loss": 1 / step} for step in (1, 2, 3)
    ]
    file.write(4, {"loss": float("nan"), "norm": float("inf"), "lr": 0.1})
    assert json.loads(file.path.read_text().splitlines()[-1]) == {"step": 4, "loss": None, "norm": None, "lr": 0.1}


def test_a_whole_last_line_without_an_end_is_repaired(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 1}\n{"step": 2}')
    file.rewind(2)
    file.write(3, {})
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_the_peak_is_at_least_what_an_independent_clock_finds() -> None:
    import time

    x = torch.randn(512, 512)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(x, x)
    mean = 5 * 2 * 512**3 / (time.perf_counter() - start)
    peak = matmul_peak(torch.float32, shape=(512, 512, 512))
    assert 0.3 * mean < peak < 1e15
    with pytest.raises(UsageError, match="floating-point"):
        matmul_peak(torch.int8)


def test_a_peak_that_a_run_surpasses_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was busy at first; what is no slip of a measurement is told as it is."""
    rates = iter([10.0, 5.0, 40.0, 30.0, 99.0])
    monkeypatch.setattr("herd.train.peak.matmul_peak", lambda *_: next(rates))
    peak = Peak(torch.float32, torch.device("cpu"))
    assert [peak.share(rate) for rate in (5, 20, 20, 20, 80, 80)] == [0.5, 2.0, 0.5, 0.5, 2.0, 2.0]


def test_memory_is_the_resident_set() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc/self/status")
    kilobytes = int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text()).group(1))  # type: ignore[union-attr]
    assert memory_bytes(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.02)


def test_freed_memory_is_kept() -> None:
    """Page faults of allocating and freeing the same 64 MB again and again; the fewest, as the system may swap."""
    code = (
        "import resource, sys, torch\n"
        "from herd.train.memory import keep_freed_memory\n"
        "if sys.argv[1] == 'keep' and not keep_freed_memory(): print('no glibc'); sys.exit()\n"
        "for _ in range(4): torch.ones(16_000_000).add_(1)\n"
        "faults = []\n"
        "for _ in range(5):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(16_000_000).add_(1)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "print(min(faults))\n"
    )
    found = {}
    for name in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        if "no glibc" in done.stdout:
            pytest.skip("the C library is not glibc")
        found[name] = int(done.stdout)
    # By how much depends on the kernel's page size: 78,000 small pages, or some 150 huge ones and their leftovers.
    assert found["keep"] < found["default"] / 2
    assert keep_freed_memory() == keep_freed_memory()


def test_time_left_reads_like_a_clock() -> None:
    assert [_clock(seconds) for seconds in (5, 65, 3599, 7265)] == ["0:05", "1:05", "59:59", "2 h 01 min"]


def test_no_more_time_is_left_than_a_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However long so many steps would take at the pace of late: the plan will be revised."""

    class Ends(Callback):
        def seconds_left(self) -> float:
            return 42.0

        def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
            if record.step == 3:
                raise InterruptedError

    monkeypatch.setattr("herd.train.metrics._LINE_SECONDS", 0.0)
    with pytest.raises(InterruptedError):
        trainer(Case("dense", 1, {}), tmp_path, [Ends()], steps=10**9).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert len(lines) == 2 and all(line.endswith(" · 0:42 left") for line in lines)
    limit = TimeLimit(100.0, tmp_path / "plan.json", started=time.monotonic() - 30)
    assert 69 < limit.seconds_left() <= 70


def test_the_config_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from herd.train import TrainConfig\n"
        "from herd.pretrain import PretrainConfig\n"
        "assert PretrainConfig(train=TrainConfig(steps=3)).train.steps == 3\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(seconds: float) -> list[str]:
        monkeypatch.setattr("herd.train.metrics._LINE_SECONDS", seconds)
        trainer(Case("dense", 1, {}), tmp_path / str(seconds), [], steps=4).fit()
        return [line for line in capsys.readouterr().err.splitlines() if "step" in line]

    assert told(3600.0) == []
    lines = told(0.0)
    assert len(lines) == 4 and re.search(r"herd: step 3/4 · loss \d\.\d+ · .* · 0:\d\d left", lines[2])
