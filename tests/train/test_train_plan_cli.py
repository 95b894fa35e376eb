"""`herd plan` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

RUN = ("llama3.1-405b", "--gpus", "8192", "--memory", "80GiB", "--seq", "8192", "--batch-tokens", "16777216")
OWN = (*RUN, "--trainer", "herd")


def herd_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs where torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from herd.cli import main; main()"
    command = [sys.executable, "-c", code, "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_json_begins_with_the_layout() -> None:
    result = herd_plan(*RUN, "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert next(iter(data)) == "layout"
    assert list(data["layout"].items()) == [("tp", 8), ("cp", 1), ("pp", 16), ("dp", 64)]
    parts = data["memory"]["parts"]
    assert sum(parts.values()) == pytest.approx(data["memory"]["needed"])
    assert {"weights", "gradients", "optimizer", "activations"} < set(parts)
    chosen = data["settings"]
    assert data["memory_by_schedule"][chosen["schedule"]][chosen["recompute"]] == data["memory"]["needed"]
    assert sum(data["time"]["parts"].values()) == pytest.approx(data["time"]["seconds"])
    assert data["speed"]["mfu"] == pytest.approx(0.43, abs=0.01)
    assert data["communication"]["tp"] | {"bytes": 0, "seconds": 0} == {
        "bytes": 0, "seconds": 0, "ranks": 8, "in_node": 8,
    }  # fmt: skip


def test_it_plans_what_our_own_trainer_holds() -> None:
    """The layout of the published run does not fit it but with everything computed again."""
    data = json.loads(herd_plan(*OWN, "--json", "--tp", "8", "--cp", "1", "--pp", "16").stdout)
    assert data["settings"]["trainer"] == "herd" and data["settings"]["recompute"] == "full"
    published = json.loads(herd_plan(*RUN, "--json").stdout)
    assert data["time"]["seconds"] > published["time"]["seconds"]
    assert data["memory"]["parts"]["optimizer"] == published["memory"]["parts"]["optimizer"]
    assert data["memory_by_schedule"]["interleaved"]["none"] > 3 * published["memory"]["needed"]


def test_tables_for_people() -> None:
    result = herd_plan(*RUN)
    assert "layout       tp=8 cp=1 pp=16 dp=64\n" in result.stdout
    for words in ("interleaved, 8 chunks a rank, bubble 5.9%", "MFU 43.5%", "of 80.0", "looped-bfs", "GB a step"):
        assert words in result.stdout
    alone = herd_plan("llama3.2-1b", "--gpus", "1", "--seq", "2048", "--batch-tokens", "65536")
    assert alone.returncode == 0 and "pipeline     none" in alone.stdout and "GB a step" not in alone.stdout
    experts = herd_plan(
        "llama4-scout-17b-16e", "--gpus", "64", "--seq", "8192", "--batch-tokens", "4194304", "--ep", "8"
    )
    assert experts.returncode == 0 and " ep=8\n" in experts.stdout


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (("--tp", "5"), 2, "tp=5 does not divide n_heads = 128"),
        (("--memory", "80Gb3"), 2, "this is no size"),
        (("--memory", "80"), 2, "--memory 80GiB"),
        (("--gpu", "h1000"), 2, "h100"),
        (("--batch-tokens", "1000"), 2, "a multiple of 8,192"),
        (("--gpus", "16"), 4, "GiB or more"),
        (("--gpus", "0"), 2, "--gpus"),
    ],
)
def test_errors(changes: tuple[str, ...], code: int, words: str) -> None:
    result = herd_plan(*RUN, *changes)
    assert result.returncode == code and words in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_name_that_is_no_model() -> None:
    result = herd_plan("llama9", *RUN[1:])
    assert result.returncode in (2, 3) and "llama9" in result.stderr
