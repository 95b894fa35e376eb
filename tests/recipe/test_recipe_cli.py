"""`herd run` and `herd report` as a user types them, with the small stages of conftest.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import herd.recipe
from herd.cli import main
from herd.errors import UsageError


@pytest.fixture
def herd_command(workshop, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `herd …` in the workshop's folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(workshop.root)
    monkeypatch.setattr(herd.recipe, "stage_table", workshop.table)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return command


def test_a_run_tells_what_it_did(herd_command, workshop) -> None:
    code, out, err = herd_command("run", "small.yaml", "count.top=1")
    assert code == 0
    assert "runs/small" in err and "✓ count" in err and "1 words kept" in err
    assert "total" in out and "1 words kept" in out
    assert (workshop.root / "runs" / "small" / "run.json").is_file()
    code, out, err = herd_command("run", "small.yaml", "count.top=1")
    assert code == 0 and "– count" in err and "unchanged" in err and "(kept)" in out
    assert workshop.calls == ["words", "count", "square"]


def test_json_alone_is_on_standard_output(herd_command, workshop) -> None:
    code, out, err = herd_command("run", "small.yaml", "--json", "--out", "elsewhere")
    state = json.loads(out)
    assert code == 0 and state["run"] == "elsewhere" and list(state["stages"]) == ["words", "count", "square"]
    assert state["stages"]["count"]["status"] == "done" and "✓ count" in err


def test_a_dry_run_writes_nothing(herd_command, workshop) -> None:
    code, out, _ = herd_command("run", "small.yaml", "--dry-run")
    assert code == 0 and "after words" in out and not (workshop.root / "runs").exists()
    code, out, _ = herd_command("run", "small.yaml", "--dry-run", "--json", "--from", "count")
    plan = json.loads(out)["stages"]
    assert [stage["stage"] for stage in plan] == ["words", "count", "square"]
    assert plan[1]["config"] == {"top": 2, "steps": 4, "seed": 5} and plan[1]["reason"] == "asked for"
    assert not (workshop.root / "runs").exists() and workshop.calls == []


def test_ctrl_c_says_how_to_go_on(herd_command, workshop) -> None:
    workshop.fail_with = KeyboardInterrupt()
    code, out, err = herd_command("run", "small.yaml", "count.top=1", "--out", "my runs")
    assert code == 130 and out == ""
    assert "herd run small.yaml count.top=1 --out 'my runs' continues where it was" in err
    workshop.fail_with = None
    assert herd_command("run", "small.yaml", "count.top=1", "--out", "my runs")[0] == 0
    assert workshop.calls == ["words", "count", "count", "square"]


def test_a_stop_by_sigterm_leaves_with_zero(herd_command, workshop) -> None:
    workshop.fail_with = SystemExit(0)
    code, _, err = herd_command("run", "small.yaml")
    assert code == 0 and "continues where it was" in err
    workshop.fail_with = SystemExit(5)
    assert herd_command("run", "small.yaml")[0] == 5, "any other exit keeps its code"


def test_failures_have_their_codes_and_the_next_command(herd_command, workshop) -> None:
    workshop.fail_with = RuntimeError("no luck")
    code, _, err = herd_command("run", "small.yaml")
    assert code == 1 and "stage 'count' failed: RuntimeError: no luck" in err and "herd run small.yaml goes on" in err
    assert "Traceback" not in err
    workshop.fail_with = UsageError("two fields contradict each other", allowed="one of them")
    code, _, err = herd_command("run", "small.yaml")
    assert code == 2 and "contradict" in err and "goes on" not in err, "the same command would fail again"
    for arguments, words in {
        ("run", "smal.yaml"): "no such recipe",
        ("run", "small.yaml", "cuont.top=1"): "did you mean 'count'",
        ("run", "small.yaml", "count.topp=1"): "did you mean 'top'",
        ("run", "small.yaml", "--from", "cuont"): "did you mean 'count'",
    }.items():
        code, out, err = herd_command(*arguments)
        assert code == 2 and words in err and out == ""


def test_report_lists_what_it_wrote(herd_command, finished_run: Path) -> None:
    code, out, _ = herd_command("report", str(finished_run))
    assert code == 0 and [Path(line).name for line in out.split()] == ["report.html", "MODEL_CARD.md", "loss.png"]
    code, out, _ = herd_command("report", str(finished_run), "--json")
    assert len(json.loads(out)["files"]) == 3
    code, _, err = herd_command("report", "nowhere")
    assert code == 3 and "run.json" in err
