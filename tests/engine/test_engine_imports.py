"""The engine's face needs no torch; a model without a backend says which package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDE_TORCH = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else real(name, package)
import herd, herd.engine, herd.cli.chat, herd.cli.generate
assert "torch" not in sys.modules
try:
    herd.LLM(sys.argv[1])
except herd.MissingDependency as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_without_torch(tiny: Path) -> None:
    result = subprocess.run([sys.executable, "-c", HIDE_TORCH, str(tiny)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "'torch'" in result.stdout and "pip install torch" in result.stdout
