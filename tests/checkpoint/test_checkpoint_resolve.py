"""What a model argument may be, and what a wrong one is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from herd import FileFormatError, HerdError
from herd.architecture import LlamaConfig
from herd.checkpoint import continuing, open_checkpoint, pulled_repositories, resolve, save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No model of the machine the tests run on is seen."""
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "herd"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_directory(home: Path, small: Small, name: str = "runs/pocket") -> Path:
    config, weights = small("llama3")
    save(home / name / "sft-0123abcd" / "checkpoint", config, weights)
    (home / name / "run.json").write_text(json.dumps({"model": "sft-0123abcd/checkpoint", "stages": {}}))
    return home / name


def test_paths_run_directories_and_repositories_are_found(home: Path, small: Small) -> None:
    config, weights = small("llama3")
    directory = save(home / "plain", config, weights)
    file = save(home / "m.gguf", config, weights, format="gguf")
    assert resolve(directory) == directory
    assert resolve(str(file)) == file
    run = _run_directory(home, small)
    assert resolve("runs/pocket") == (run / "sft-0123abcd" / "checkpoint").resolve()
    pulled = save(home / "herd/models/meta-llama/Llama-3.2-1B", config, weights)
    assert resolve("meta-llama/Llama-3.2-1B") == pulled
    for name in ("runs/pocket", "m.gguf", "meta-llama/Llama-3.2-1B", "plain"):
        with open_checkpoint(name) as checkpoint:
            assert checkpoint.config == config


def test_texts_are_continued_by_the_base_model_of_a_run(home: Path, small: Small) -> None:
    run = _run_directory(home, small)
    assert continuing(run) == resolve(run), "without a base model as everywhere"
    config, weights = small("llama3")
    base = save(run / "base-0123abcd" / "checkpoint", config, weights)
    state = json.loads((run / "run.json").read_text())
    for directory, expected in (("base-0123abcd", base), ("base-77", None), ("../base-0123abcd", None), (7, None)):
        (run / "run.json").write_text(json.dumps(state | {"stages": {"base": {"directory": directory}}}))
        assert continuing("runs/pocket") == (expected.resolve() if expected else resolve(run))
    longer = save(run / "extend-0123abcd" / "checkpoint", config, weights)
    both = {"stages": {"base": {"directory": "base-0123abcd"}, "extend": {"directory": "extend-0123abcd"}}}
    (run / "run.json").write_text(json.dumps(state | both))
    assert continuing(run) == longer.resolve(), "a context that was extended stays so"
    assert continuing(base) == base
    with pytest.raises(HerdError, match="no such model"):
        continuing("nowhere")


def test_repositories_in_the_hugging_face_cache_are_found(home: Path, small: Small) -> None:
    config, weights = small("llama3")
    folder = home / "hf-home/hub/models--someone--tiny-llama"
    revision = "0123456789abcdef0123456789abcdef01234567"
    save(home / "blob", config, weights)
    (folder / "snapshots" / revision).mkdir(parents=True)
    for file in (home / "blob").iterdir():  # the cache holds links
        (folder / "snapshots" / revision / file.name).symlink_to(file)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    assert resolve("someone/tiny-llama") == folder / "snapshots" / revision
    with open_checkpoint("someone/tiny-llama") as checkpoint:
        assert checkpoint.config == config
    assert pulled_repositories() == ["someone/tiny-llama"]
    (folder / "refs" / "main").write_text("../../../etc")
    with pytest.raises(HerdError, match="no such model"):
        resolve("someone/tiny-llama")


def test_a_miss_names_what_is_near_and_the_command(home: Path, small: Small) -> None:
    _run_directory(home, small)
    (home / "herd/models/meta-llama/Llama-3.2-1B-Instruct").mkdir(parents=True)
    with pytest.raises(HerdError, match=r"near names: .*runs/pocket") as caught:
        resolve("runs/pockt")
    assert "runs/pockt" not in str(caught.value.fix)  # it is a mistyped path, not a repository
    with pytest.raises(HerdError, match="herd run llama2-7b makes it"):
        resolve("runs/llama2-7b")
    with pytest.raises(HerdError, match=r"meta-llama/Llama-3.2-1B-Instruct") as caught:
        resolve("meta-llama/Llama-3.2-1B-Instrct")
    assert caught.value.fix == "herd pull meta-llama/Llama-3.2-1B-Instrct"
    with pytest.raises(HerdError, match=r"near names: .*llama3\.1-8b"):
        resolve("llama-3.1-8B")
    with pytest.raises(HerdError, match=r"release is not on the machine.*herd pull"):
        resolve("llama3.1-8b")
    with pytest.raises(HerdError, match="herd list"):
        resolve("zzzzzz")
    with pytest.raises(HerdError, match="no such model"):
        resolve("../../etc/passwd/x")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "~no_such_user/model"])
def test_names_that_cannot_be_paths_are_explained(name: str) -> None:
    with pytest.raises(HerdError, match="this path cannot be used"):
        resolve(name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"stages": {}}', "no model yet"),
        ('{"model": ""}', "no model yet"),
        ('{"model": 7}', "no model yet"),
        ('{"model": "../secret"}', "inside the run directory"),
        ('{"model": "/etc"}', "inside the run directory"),
        ('{"model": "sft/checkpoint"}', "model is missing"),
        ('{"model": "a", "model": "b"}', "appears twice"),
        ("{", "not valid JSON"),
    ],
)
def test_a_broken_run_directory_is_explained(home: Path, content: str, match: str) -> None:
    (home / "secret").mkdir()
    (home / "run").mkdir()
    (home / "run" / "run.json").write_text(content)
    with pytest.raises(FileFormatError, match=match):
        resolve("run")
