"""The command line as a person meets it: help, errors, exit codes, JSON, and what it must not import."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from herd.cli import VERBS


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


def test_unknown_verb_is_a_usage_error_with_advice() -> None:
    result = herd("chta")
    assert result.returncode == 2
    assert "herd chat" in result.stderr and "Traceback" not in result.stderr


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


def test_doctor_reports_the_compiled_part() -> None:
    found = json.loads(herd("doctor", "--json").stdout)
    assert found["packages"]["torch"] and isinstance(found["native"]["built"], bool)


def test_native_features_agree_with_the_kernel() -> None:
    native = pytest.importorskip("herd._native", reason="installed without a compiler")
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split(":")[1].split()
    except (OSError, StopIteration):
        pytest.skip("the kernel does not list x86 flags here")
    for name, present in native.cpu_features().items():
        assert present == (name in flags), name
