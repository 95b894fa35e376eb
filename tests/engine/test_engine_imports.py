"""Which backend answers where something is not installed: without torch the native one, without that torch.

Every case is a process of its own, in which the missing modules cannot be imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
path, backend, *hidden = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden))  # an import finds None there, and fails as if nothing were installed
import herd, herd.engine, herd.cli.chat, herd.cli.generate
assert sys.modules.get("torch") is None, "the engine's face imported torch"
try:
    with herd.LLM(path, backend=backend) as llm:
        answer = llm.generate("def ", temperature=0, max_tokens=5, ignore_eos=True)
        print(type(llm._backend).__name__, answer.usage.completion_tokens)
except herd.HerdError as error:
    print(type(error).__name__, error)
if backend != "torch" and "herd._native" not in hidden:
    assert sys.modules.get("torch") is None, "the native backend imported torch"
"""


def outcome(path: Path, backend: str, *hidden: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(path), backend, *hidden]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("hidden", [(), ("torch",)], ids=["all installed", "without torch"])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_the_native_backend_needs_no_torch(tiny: Path, backend: str, hidden: tuple[str, ...]) -> None:
    pytest.importorskip("herd._native")
    assert outcome(tiny, backend, *hidden) == "NativeBackend 5"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_without_the_compiled_part_torch_answers(tiny: Path, backend: str) -> None:
    pytest.importorskip("torch")
    assert outcome(tiny, backend, "herd._native") == "TorchBackend 5"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_without_any_backend_the_error_names_torch(tiny: Path, backend: str) -> None:
    said = outcome(tiny, backend, "torch", "herd._native")
    assert said.startswith("MissingDependency") and "'torch'" in said and "pip install torch" in said


def test_without_the_compiled_part_the_native_backend_says_so(tiny: Path) -> None:
    said = outcome(tiny, "native", "herd._native")
    assert said.startswith("HerdError") and "compiled part is missing" in said and "herd doctor" in said
