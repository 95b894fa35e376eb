"""The command line as a person meets it: help, errors, exit codes, JSON, and what it must not import."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli import VERBS
from herd.cli.output import emit, speak, told, typed
from herd.errors import HerdError


def herd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from herd.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_every_verb() -> None:
    result = herd("--help")
    assert result.returncode == 0
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb: str) -> None:
    result = herd(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert "Examples" in result.stdout and f"herd {verb}" in result.stdout
    assert "--json" in result.stdout or verb == "chat"


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_light_until_they_run(verb: str) -> None:
    code = (
        f"import sys, importlib; importlib.import_module('herd.cli.{VERBS[verb][0]}');"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_torch_free_rooms_import_without_torch() -> None:
    rooms = ("herd", "herd.architecture", "herd.tokenizer", "herd.checkpoint", "herd.engine", "herd.corpus", "herd.cli")
    code = f"import sys; sys.modules['torch'] = None\nfor room in {rooms!r}: __import__(room)\nimport herd; herd.LLM"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_models_words_cannot_steer_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "tab\there\n\x1b]0;title\x07\x1b[2J\r\x9b1m é"
    for terminal, expected in ((False, words), (True, "tab\there\n␛]0;title␇␛[2J␍\ufffd1m é")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stdout", out)
        speak(words)
        monkeypatch.undo()
        assert out.getvalue() == expected


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": [1.5, math.nan, {"b": (math.inf, -math.inf)}], "c": True}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, {"b": [None, None]}], "c": True}


def test_unknown_verb_is_a_usage_error_with_advice() -> None:
    result = herd("chta")
    assert result.returncode == 2
    assert "herd chat" in result.stderr and "Traceback" not in result.stderr


def test_an_unknown_verb_of_a_family_is_named_whole() -> None:
    result = herd("scaling", "rnu")
    assert result.returncode == 2 and "got scaling rnu" in result.stderr and "herd scaling run" in result.stderr


def test_commands_are_told_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a shell whose PATH does not lead to the program, by its place."""
    program = tmp_path / ".venv" / "bin" / "herd"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert typed("herd chat runs/a") == ".venv/bin/herd chat runs/a"
    assert typed("torchrun -m herd run a") == "torchrun -m herd run a"
    error = HerdError("herd: no", value="herd run", fix="herd list; then herd run goes on, as herd does")
    wanted = "to fix: .venv/bin/herd list; then .venv/bin/herd run goes on, as herd does"
    assert told(error) == f"herd: no; got herd run; {wanted}"
    monkeypatch.chdir("/")
    assert typed("herd chat runs/a").endswith(f"{str(program)[1:]} chat runs/a")
    monkeypatch.setenv("PATH", str(program.parent))
    assert typed("herd chat runs/a") == "herd chat runs/a" and told(error) == str(error)


def test_help_and_doctor_need_no_torch() -> None:
    for arguments in (["--help"], ["list"], ["doctor"]):
        code = f"import sys; sys.modules['torch'] = None\nfrom herd.cli import main; main({arguments!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr


def test_a_system_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from herd import checkpoint
    from herd.cli import main

    for error, words in (
        (OSError(28, "No space left on device", "/disk/x"), "the system refused at /disk/x: No space left"),
        (MemoryError(), "not enough memory"),
    ):

        def fail(*arguments: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(checkpoint, "convert", fail)
        with pytest.raises(SystemExit) as ended:
            main(["convert", "a", "no-such-target", "--to", "hf"])
        assert ended.value.code == 4
        assert words in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "from herd.cli import main; main(['list', '--json'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.read(10)
        writer.stdout.close()
        errors = writer.stderr.read()
        assert (writer.wait(timeout=60), errors) == (0, b"")


def test_output_survives_any_encoding() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "herd", "list", "405b"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0 and b"\\u2500" in result.stdout


def test_unknown_option_is_a_usage_error() -> None:
    result = herd("list", "--nonsense")
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_list_as_json_is_the_releases_table() -> None:
    releases = importlib.import_module("herd.architecture").releases
    rows = json.loads(herd("list", "--json").stdout)
    assert {row["name"]: row["parameters"] for row in rows} == {n: r.parameters for n, r in releases.items()}


def test_list_as_table_shows_whole_numbers() -> None:
    result = herd("list", "405b")
    assert "405,853,388,800" in result.stdout and "131,072" in result.stdout
    assert herd("list", "LLAMA3.1-405B").stdout == herd("list", "llama3.1-405b").stdout != ""
    missing = herd("list", "gpt")
    assert missing.returncode == 2 and "no release" in missing.stderr


def test_doctor_reports_the_compiled_part() -> None:
    found = json.loads(herd("doctor", "--json").stdout)
    assert found["packages"]["torch"] and isinstance(found["native"]["built"], bool)


@pytest.mark.parametrize("compiler", [True, False])
def test_doctor_says_what_is_missing_without_the_compiled_part(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from herd.cli import doctor

    monkeypatch.setitem(sys.modules, "herd._native", None)  # what an installation without a compiler looks like
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++" if compiler else None)
    found = doctor.examine()
    assert found["native"]["built"] is False
    advice = next(line for line in found["advice"] if "compiled part" in line)
    assert "torch only" in advice and "k-quants" in advice
    assert "pip install" in advice and ("install a C++20 compiler" in advice) is not compiler


def test_native_features_agree_with_the_kernel() -> None:
    native = pytest.importorskip("herd._native", reason="installed without a compiler")
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split(":")[1].split()
    except (OSError, StopIteration):
        pytest.skip("the kernel does not list x86 flags here")
    for name, present in native.cpu_features().items():
        assert present == (name in flags), name
