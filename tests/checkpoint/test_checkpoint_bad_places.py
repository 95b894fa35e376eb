"""Places that hold no model, and files that change while they are open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from herd import FileFormatError, HerdError
from herd.architecture import LlamaConfig
from herd.checkpoint import open_checkpoint

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
Refused = Callable[..., FileFormatError]


def test_places_without_a_model_say_what_is_expected(tmp_path: Path, hf: Path, refused: Refused) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileFormatError, match="no model is in this directory"):
        open_checkpoint(empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileFormatError, match="safetensors"):
        open_checkpoint(empty)
    (empty / "pytorch_model.bin").unlink()
    (empty / "checkpoint").mkdir()
    with pytest.raises(FileFormatError, match=r"to fix: use .*empty/checkpoint"):
        open_checkpoint(empty)
    (hf / "config.json").rename(empty / "config.json")
    refused(hf, "no such file", file="config.json")
    with pytest.raises(HerdError, match="not a GGUF file"):
        open_checkpoint(empty / "config.json")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FileFormatError, match="regular file"):  # and does not wait for a writer
        open_checkpoint(tmp_path / "pipe.gguf")
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_bytes(b"GGUF")
    with pytest.raises(HerdError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        open_checkpoint(empty)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(hf: Path) -> None:
    with open_checkpoint(hf) as checkpoint:
        os.truncate(hf / "model.safetensors", 5000)
        with pytest.raises(FileFormatError, match="shorter while it was read"):
            checkpoint["output.weight"]


def test_a_closed_checkpoint_says_so(hf: Path) -> None:
    with open_checkpoint(hf) as checkpoint:
        pass
    with pytest.raises(HerdError, match="checkpoint is closed"):
        checkpoint["norm.weight"]
