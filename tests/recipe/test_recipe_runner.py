"""The runner with real stages and real files: what runs, what is skipped, what resumes, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from herd.errors import FileFormatError, HerdError, ResourceError, UsageError
from herd.recipe import StageEvent, StageFailed, load_recipe, place, preview, read_run, run
from herd.recipe.lock import run_lock


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


def test_first_run_does_everything_and_the_second_nothing(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe, events = load_recipe(recipe_file), list[StageEvent]()
    first = run(recipe, workshop.table(), run_dir, on_event=events.append)
    assert workshop.calls == ["words", "count", "square"]
    assert [(event.kind, event.stage) for event in events] == [
        (kind, stage) for stage in ("words", "count", "square") for kind in ("start", "done")
    ]
    squares = json.loads((run_dir / first["stages"]["square"]["directory"] / "squares.json").read_text())
    assert squares == {"the": 9.0, "and": 4.0}
    assert first["stages"]["square"]["summary"] == "seed 5"

    events.clear()
    second = run(recipe, workshop.table(), run_dir, on_event=events.append)
    assert workshop.calls == ["words", "count", "square"]
    assert {event.kind for event in events} == {"skip"}
    assert second == first == read_run(run_dir)
    assert first["command"] == f"herd run {recipe_file}"


def test_the_manifest_tells_what_made_the_result(workshop, recipe_file: Path, run_dir: Path) -> None:
    state = run(load_recipe(recipe_file), workshop.table(), run_dir)
    manifest = workshop.manifest(state, "count", run_dir)
    directory = run_dir / state["stages"]["count"]["directory"]
    assert directory.name == f"count-{manifest['hash'][:8]}"
    assert manifest["status"] == "done" and manifest["attempts"] == 1 and manifest["error"] is None
    assert manifest["key"]["config"] == {"top": 2, "steps": 4, "seed": 5}
    assert manifest["key"]["inputs"] == {"words": state["stages"]["words"]["hash"]}
    assert manifest["inputs"]["words"]["digest"] == workshop.manifest(state, "words", run_dir)["digest"]
    assert set(manifest["artefacts"]) == {"checkpoint/counts.json", "steps.json"}, "state is not a result"
    for name, entry in manifest["artefacts"].items():
        content = (directory / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["wall_seconds"] >= 0 and manifest["cpu_seconds"] >= 0 and manifest["peak_memory_bytes"] > 1e6
    assert manifest["started"] <= manifest["finished"] and manifest["finished"].endswith("+00:00")
    assert manifest["host"]["cores"] >= 1 and manifest["host"]["cpu"]
    assert manifest["packages"]["herd"] and manifest["packages"]["numpy"]
    # The hash is what anyone can compute from the key.
    text = json.dumps(manifest["key"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest["hash"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_changed_value_reruns_its_stage_and_those_after_it(workshop, recipe_file: Path, run_dir: Path) -> None:
    before = run(load_recipe(recipe_file), workshop.table(), run_dir)
    after = run(load_recipe(recipe_file, ["count.top=1"]), workshop.table(), run_dir)
    assert workshop.calls == ["words", "count", "square", "count", "square"]
    assert after["stages"]["words"] == before["stages"]["words"]
    assert after["stages"]["count"]["directory"] != before["stages"]["count"]["directory"]
    # Going back finds the old directories.
    assert run(load_recipe(recipe_file), workshop.table(), run_dir) == before
    assert len(workshop.calls) == 5


def test_changed_sources_and_changed_code_rerun(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe = load_recipe(recipe_file)
    run(recipe, workshop.table(), run_dir)
    (workshop.root / "notes" / "a.txt").touch()
    run(recipe, workshop.table(), run_dir)
    assert len(workshop.calls) == 3, "a new modification time alone changes nothing"
    (workshop.root / "notes" / ".git").mkdir()
    (workshop.root / "notes" / ".git" / "index").write_text("what no stage reads")
    run(recipe, workshop.table(), run_dir)
    assert len(workshop.calls) == 3, "hidden files are not read, so they change nothing"
    (workshop.root / "notes" / "a.txt").write_text("the cat and the dog and the bat ")
    run(recipe, workshop.table(), run_dir)
    assert len(workshop.calls) == 6
    (workshop.root / "notes" / "b.txt").rename(workshop.root / "notes" / "c.txt")
    run(recipe, workshop.table(), run_dir)
    assert len(workshop.calls) == 9
    workshop.versions["words"] = 2
    run(recipe, workshop.table(), run_dir)
    assert len(workshop.calls) == 12


def test_damaged_artefacts_are_made_again(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe = load_recipe(recipe_file)
    state = run(recipe, workshop.table(), run_dir)
    counts = run_dir / state["stages"]["count"]["directory"] / "checkpoint" / "counts.json"
    original = counts.read_bytes()
    for damaged in (original.replace(b"3", b"4"), original + b" ", None):
        if damaged is None:
            counts.unlink()
        else:
            counts.write_bytes(damaged)
        calls = len(workshop.calls)
        events: list[StageEvent] = []
        assert run(recipe, workshop.table(), run_dir, on_event=events.append) == read_run(run_dir)
        assert workshop.calls[calls:] == ["count"], "the result came out the same, so nothing after it runs"
        assert counts.read_bytes() == original
        assert "counts.json" in next(event for event in events if event.kind == "start").reason


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 99}'])
def test_damaged_manifests_are_not_trusted(workshop, recipe_file: Path, run_dir: Path, content: bytes) -> None:
    recipe = load_recipe(recipe_file)
    state = run(recipe, workshop.table(), run_dir)
    (run_dir / state["stages"]["words"]["directory"] / "stage.json").write_bytes(content)
    run(recipe, workshop.table(), run_dir)
    assert workshop.calls == ["words", "count", "square", "words"]


def test_an_input_made_again_with_another_result_reruns_what_reads_it(
    workshop, recipe_file: Path, run_dir: Path
) -> None:
    recipe = load_recipe(recipe_file)
    state = run(recipe, workshop.table(), run_dir)
    # The same stage hash, another result: as when training is not deterministic.
    words = run_dir / state["stages"]["words"]["directory"] / "words.json"
    words.write_text('["other"]')
    manifest = workshop.manifest(state, "words", run_dir)
    from herd.recipe.manifest import write_artefacts

    write_artefacts(words.parent, manifest)
    run(recipe, workshop.table(), run_dir)
    assert workshop.calls == ["words", "count", "square", "count", "square"]


def test_a_failed_stage_says_so_and_the_next_run_goes_on(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe = load_recipe(recipe_file)
    workshop.fail_with = ValueError("the disc is made of cheese")
    with pytest.raises(StageFailed) as caught:
        run(recipe, workshop.table(), run_dir, command="herd run small.yaml")
    message = str(caught.value)
    assert "'count' failed" in message and "ValueError: the disc is made of cheese" in message
    assert "herd run small.yaml" in message and "error.log" in message
    assert caught.value.exit_code == 1
    state = read_run(run_dir)
    assert {name: entry["status"] for name, entry in state["stages"].items()} == {"words": "done", "count": "failed"}
    directory = run_dir / state["stages"]["count"]["directory"]
    assert "Traceback" in (directory / "error.log").read_text()
    assert workshop.manifest(state, "count", run_dir)["error"] == "the disc is made of cheese"

    workshop.fail_with = None
    state = run(recipe, workshop.table(), run_dir)
    assert workshop.calls == ["words", "count", "count", "square"]
    manifest = workshop.manifest(state, "count", run_dir)
    assert manifest["status"] == "done" and manifest["attempts"] == 2 and manifest["error"] is None
    assert json.loads((directory / "steps.json").read_text()) == ["0", "1", "2", "3"], "resumed, not begun anew"
    assert not (directory / "error.log").exists()


def test_the_cause_decides_the_exit_code(workshop, recipe_file: Path, run_dir: Path) -> None:
    causes = {
        UsageError("no such thing", value=3, allowed="4", fix="herd list"): 2,
        ResourceError("memory"): 4,
        MemoryError(): 4,
        OSError(28, "No space left on device"): 4,
        KeyError("x"): 1,
    }
    for cause, code in causes.items():
        workshop.fail_with = cause
        with pytest.raises(StageFailed) as caught:
            run(load_recipe(recipe_file), workshop.table(), run_dir)
        assert caught.value.exit_code == code


@pytest.mark.parametrize(
    "cause, said",
    [
        (UsageError("no such thing", value=3, allowed="4", fix="herd list"),
         "no such thing; got 3; allowed: 4; to fix: herd list; then herd run .* goes on with this stage"),
        (UsageError("no", fix="a.b=3, or other rows"), "no; to fix: a.b=3, or other rows$"),
        (UsageError("no", fix="use another mesh"), "no; to fix: use another mesh$"),
        (UsageError("no"), "failed: no$"),
        (HerdError("short", fix="a.b=3 asks less"), "short; to fix: a.b=3 asks less$"),
        (HerdError("short", fix="wait"), "short; to fix: wait; then herd run"),
        (RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
         r"failed: another rank has stopped, or cannot be reached; to fix: herd run .* \(the traceback is in"),
    ],
)  # fmt: skip
def test_what_is_advised_can_be_followed(
    workshop, recipe_file: Path, run_dir: Path, cause: Exception, said: str
) -> None:
    workshop.fail_with = cause
    with pytest.raises(StageFailed, match=said):
        run(load_recipe(recipe_file), workshop.table(), run_dir)


def test_a_full_disk_does_not_hide_the_failure(
    workshop, recipe_file: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("herd.recipe.runner.atomic_write", full)
    workshop.fail_with = OSError(28, "No space left on device")
    with pytest.raises(StageFailed, match=r"'count' failed: OSError.*No space left") as caught:
        run(load_recipe(recipe_file), workshop.table(), run_dir)
    assert caught.value.exit_code == 4
    workshop.fail_with = None
    monkeypatch.undo()
    run(load_recipe(recipe_file), workshop.table(), run_dir)
    assert workshop.calls == ["words", "count", "count", "square"]


@pytest.mark.parametrize("signal_like", [KeyboardInterrupt(), SystemExit(0)])
def test_an_interrupted_stage_resumes(workshop, recipe_file: Path, run_dir: Path, signal_like: BaseException) -> None:
    recipe, events = load_recipe(recipe_file), list[StageEvent]()
    workshop.fail_with = signal_like
    with pytest.raises(type(signal_like)):
        run(recipe, workshop.table(), run_dir, on_event=events.append)
    assert events[-1].kind == "stop"
    state = read_run(run_dir)
    assert state["stages"]["count"]["status"] == "running"
    workshop.fail_with = None
    events.clear()
    state = run(recipe, workshop.table(), run_dir, on_event=events.append)
    assert next((event.stage, event.reason) for event in events if event.kind == "start") == ("count", "it was stopped")
    steps = run_dir / state["stages"]["count"]["directory"] / "steps.json"
    assert json.loads(steps.read_text()) == ["0", "1", "2", "3"]


def test_a_stage_that_cannot_resume_starts_in_an_empty_directory(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe = load_recipe(recipe_file)
    state = run(recipe, workshop.table(), run_dir)
    directory = run_dir / state["stages"]["words"]["directory"]
    (directory / "stray.txt").write_text("left by a crash")
    manifest = json.loads((directory / "stage.json").read_text())
    (directory / "stage.json").write_text(json.dumps(manifest | {"status": "running"}))
    run(recipe, workshop.table(), run_dir)
    assert not (directory / "stray.txt").exists()


def test_from_redoes_and_only_limits(workshop, recipe_file: Path, run_dir: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(UsageError, match="--only count needs the stage 'words'"):
        run(recipe, workshop.table(), run_dir, only="count")
    run(recipe, workshop.table(), run_dir, only="words")
    assert workshop.calls == ["words"]
    run(recipe, workshop.table(), run_dir, only="count")
    assert workshop.calls == ["words", "count"]
    run(recipe, workshop.table(), run_dir)
    run(recipe, workshop.table(), run_dir, redo_from="count")
    assert workshop.calls == ["words", "count", "square", "count", "square"]
    run(recipe, workshop.table(), run_dir, redo_from="words", only="words")
    assert workshop.calls[5:] == ["words"]
    for option in ({"redo_from": "cuont"}, {"only": "cuont"}):
        with pytest.raises(UsageError, match="did you mean 'count'"):
            run(recipe, workshop.table(), run_dir, **option)


def test_the_preview_says_what_the_run_then_does(workshop, recipe_file: Path, run_dir: Path) -> None:
    def planned(overrides: list[str], **options: str) -> list[tuple[str, str]]:
        items = preview(place(load_recipe(recipe_file, overrides), workshop.table(), run_dir, **options))
        return [(decision.action, decision.reason) for _, decision in items]

    assert planned([]) == [("run", "new"), ("run", "after words"), ("run", "after count")]
    assert not run_dir.exists(), "a preview writes nothing"
    run(load_recipe(recipe_file), workshop.table(), run_dir)
    assert planned([]) == [("skip", "unchanged")] * 3
    assert planned(["count.top=1"]) == [("skip", "unchanged"), ("run", "new"), ("run", "after count")]
    assert [action for action, _ in planned([], redo_from="count")] == ["skip", "run", "run"]
    assert [action for action, _ in planned([], only="count", redo_from="count")] == ["skip", "run", "skip"]
    workshop.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe_file, ["count.top=1"]), workshop.table(), run_dir)
    assert planned(["count.top=1"])[1] == ("resume", "it was stopped")


def test_the_run_file_points_at_the_best_model(workshop, recipe_file: Path, run_dir: Path) -> None:
    from dataclasses import replace

    table = workshop.table()
    table[1], table[2] = (
        replace(table[1], name="base"),
        replace(table[2], name="sft", inputs=("base",), run=workshop.words_to_model),
    )
    file = recipe_file.with_name("model.yaml")
    file.write_text(recipe_file.read_text().replace("count:", "base:").replace("square:", "sft:"))
    state = run(load_recipe(file), table, run_dir, only="words")
    assert "model" not in state
    state = run(load_recipe(file), table, run_dir, only="base")
    assert state["model"] == state["stages"]["base"]["directory"] + "/checkpoint"
    state = run(load_recipe(file), table, run_dir)
    assert state["model"] == state["stages"]["sft"]["directory"] + "/checkpoint"
    assert (run_dir / state["model"]).is_dir()


def test_two_runs_cannot_write_the_same_directory(workshop, recipe_file: Path, run_dir: Path) -> None:
    with run_lock(run_dir), pytest.raises(ResourceError, match=f"process {os.getpid()}") as caught:
        run(load_recipe(recipe_file), workshop.table(), run_dir)
    assert caught.value.exit_code == 4 and "--out" in str(caught.value)
    run(load_recipe(recipe_file), workshop.table(), run_dir)


def test_a_killed_run_leaves_no_lock_and_resumes(workshop, recipe_file: Path, run_dir: Path) -> None:
    script = workshop.root / "child.py"
    script.write_text(
        textwrap.dedent(f"""
        import importlib.util, sys, time
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("workshop", {str(Path(__file__).with_name("conftest.py"))!r})
        module = sys.modules["workshop"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from herd.recipe import load_recipe, run

        class Hanging(BaseException):
            def __init__(self):
                print("hanging", flush=True)
                time.sleep(60)

        shop = module.Workshop(Path({str(workshop.root)!r}))
        class Slow(module.Workshop):
            fail_with = property(lambda self: Hanging(), lambda self, value: None)
        run(load_recipe({str(recipe_file)!r}), Slow(shop.root).table(), {str(run_dir)!r})
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None and child.stdout.readline() == b"hanging\n"
        with pytest.raises(ResourceError, match=f"process {child.pid}"):
            run(load_recipe(recipe_file), workshop.table(), run_dir)
        child.send_signal(signal.SIGKILL)
        child.wait()
    for _ in range(50):  # the kernel releases the lock with the process
        try:
            state = run(load_recipe(recipe_file), workshop.table(), run_dir)
            break
        except ResourceError:
            time.sleep(0.1)
    assert workshop.calls == ["words", "count", "count", "square"]
    assert workshop.manifest(state, "count", run_dir)["attempts"] == 2


def test_reading_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(FileFormatError, match="pointer file"):
        read_run(tmp_path)
