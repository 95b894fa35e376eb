"""The README's commands run as they are printed, on a small finished run where `make pocket` would put its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd import checkpoint


def blocks(repository: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (repository / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def herd(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "herd", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )


@pytest.fixture(scope="module")
def newcomer(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a newcomer has it after `make pocket`: recipes, docs and a finished (here: tiny) runs/pocket."""
    home = tmp_path_factory.mktemp("newcomer")
    for name in ("recipes", "docs"):
        shutil.copytree(repository / name, home / name)
    source = home / "text"
    source.mkdir()
    for room in ("corpus", "train", "engine", "tokenizer"):
        for file in (repository / "src" / "herd" / room).glob("*.py"):
            shutil.copy(file, source / f"{room}_{file.name}")
    tiny = repository / "tests" / "recipe" / "tiny.yaml"
    result = herd(["run", str(tiny), f"corpus.sources=[{source}]", "--out", "runs/pocket"], home)
    assert result.returncode == 0, result.stderr
    return home


@contextlib.contextmanager
def serving(arguments: list[str], cwd: Path) -> Iterator[str]:
    """`herd serve` for the time of a block; its address, when it takes requests."""
    command = [sys.executable, "-m", "herd", "serve", *arguments, "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"]
            for _ in range(600):
                with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url + "/ready"):
                    break
                time.sleep(0.1)
            yield url.removeprefix("http://")
        finally:
            process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


def test_the_commands_run(repository: Path, newcomer: Path, stack: contextlib.ExitStack) -> None:
    ran, server = 0, ""
    for line in "\n".join(blocks(repository, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            makefile = (repository / "Makefile").read_text()
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
            continue
        assert words[0] == "herd", line
        if words[1] == "serve":  # until the end of the test, wherever there is a free port
            server = stack.enter_context(serving(words[2:], newcomer))
            ran += 1
            continue
        words = [word.replace("localhost:8000", server) for word in words]
        # The long command is said in full, and only planned here.
        result = herd([*words[1:], *(["--dry-run"] if words[1] == "run" else [])], newcomer)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        ran += 1
    assert ran >= 10


def test_the_python_runs(repository: Path, newcomer: Path) -> None:
    for block in blocks(repository, "python"):
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=newcomer, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr


# serve's talks to a server: tests/serve/test_serve_docs.py runs it.
GUIDES = sorted(g for g in Path(__file__).parents[2].joinpath("docs").glob("*.md") if g.stem != "serve")


@pytest.mark.parametrize("guide", [g for g in GUIDES if "```python" in g.read_text()], ids=lambda guide: guide.stem)
def test_the_python_of_the_guides_runs(guide: Path, repository: Path, newcomer: Path) -> None:
    """All blocks of a guide in one go, on little text and the small run's tokenizer."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL))
    tiny = (repository / "tests" / "recipe" / "tiny.yaml").read_text().replace("python-stdlib", "text")
    (newcomer / "tiny.yaml").write_text(tiny)
    for said, used in (
        ("recipes/pocket.yaml", "tiny.yaml"),
        ("python-stdlib", "text"),
        ("tokenizer.model", str(checkpoint.resolve(newcomer / "runs" / "pocket"))),
        ("exercises=2000", "exercises=100, kinds=('add_small',), train={'seq_len': 256}"),
    ):
        code = code.replace(said, used)
    (newcomer / "guide.py").write_text(code)
    result = subprocess.run([sys.executable, "guide.py"], cwd=newcomer, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_links_and_benchmarks_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (repository / target).exists(), target
    for script in re.findall(r"benchmarks/\w+\.py", text):
        assert (repository / script).exists(), script
