"""A tiny model on each backend, and scripts that run once for each instruction set."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from herd import LLM, tokenizer
from herd.engine.constraint import Grammars

MakeModel = Callable[..., Path]
OnEachIsa = Callable[[str, object], dict[str, Any]]
ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other processes share the processor."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> Path:
    """Checkpoint directory of the tiny model."""
    return make_model()


@pytest.fixture(scope="session", params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend; what uses it runs on each of them."""
    name: str = request.param
    pytest.importorskip({"native": "herd._native", "torch": "torch"}[name])
    return name


@pytest.fixture(scope="session")
def llm(tiny: Path, backend: str) -> Iterator[LLM]:
    """The tiny model, loaded once, with a float32 cache so that figures compare exactly."""
    with LLM(tiny, kv="f32", backend=backend) as found:
        yield found


@pytest.fixture(scope="session")
def native_answer(tiny: Path) -> tuple[list[int], list[float] | None]:
    """What the tiny model answers on a native engine that has it to itself: tokens and log-probabilities."""
    from tests.engine.native_model import answer, native

    with native(tiny) as llm:
        return answer(llm)


@pytest.fixture(scope="session")
def tok(tiny: Path) -> tokenizer.Tokenizer:
    """The tiny model's tokenizer."""
    return tokenizer.load(tiny)


@pytest.fixture(scope="session")
def grammars(tok: tokenizer.Tokenizer) -> Grammars:
    """Grammars for the tiny model's tokenizer."""
    return Grammars(tok)


@pytest.fixture(scope="session")
def on_each_isa(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> OnEachIsa:
    """Run a script once for each instruction set, in a process of its own, because the choice is made when one starts.

    The script finds pickled cases in its first argument and writes (instruction set, results) to its second; what this
    machine does not have is left out. The compiled part is the one that this process runs.
    """
    from herd import _native

    def run(script: str, cases: object) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("isas")
        (folder / "cases").write_bytes(pickle.dumps(cases))
        (folder / "child.py").write_text(script)
        start = [sys.executable, str(repository / "tests" / "fuzz" / "sanitized.py"), _native.__file__, "--script"]
        results = {}
        for isa in ISAS:
            command = [*start, *(str(folder / name) for name in ("child.py", "cases", isa))]
            subprocess.run(command, env={**os.environ, "HERD_ISA": isa}, check=True, timeout=500)
            used, values = pickle.loads((folder / isa).read_bytes())
            if used == isa:
                results[isa] = values
        return results

    return run


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set for which the module's fixture `computed` has results."""
    name: str = request.param
    if name not in request.getfixturevalue("computed"):
        pytest.skip(f"this processor has no {name}")
    return name


@pytest.fixture(scope="session")
def bf16_isas() -> tuple[str, ...]:
    """Those that multiply bfloat16 as such: weights with rounded inputs, a cache with rounded queries and weights."""
    return "avx512_bf16", "amx"
