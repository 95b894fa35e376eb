"""Thousands of random damages to small real files: each file opens and reads within bounds, or raises HerdError.

Hypothesis chooses the damages: bytes flipped, integers overwritten with extreme values, stretches cut or doubled, and,
for text, values exchanged. Never may another exception come out, never may more memory be taken than a small multiple
of the file. The number of files tried is asserted, and printed with `pytest -rP`; `--all` tries ten times as many.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd import HerdError
from herd.architecture import LlamaConfig, tensor_shapes
from herd.checkpoint import open_checkpoint, save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Python objects for a header or a vocabulary take more than its bytes, but in proportion to them.
MEMORY_PER_BYTE, MEMORY_FLOOR = 60, 1_500_000

_EXTREMES = [0, 1, 2, 3, 31, 33, 255, 65_535, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
_PLACE = st.floats(0, 1, exclude_max=True)
_BYTES = st.one_of(
    st.binary(min_size=1, max_size=9),
    st.sampled_from(_EXTREMES).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from(_EXTREMES).map(lambda n: struct.pack("<I", n & 0xFFFFFFFF)),
)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), _PLACE, st.integers(0, 7)),
    st.tuples(st.just("overwrite"), _PLACE, _BYTES),
    st.tuples(st.just("insert"), _PLACE, _BYTES),
    st.tuples(st.just("cut"), _PLACE, _PLACE),
    st.tuples(st.just("double"), _PLACE, st.integers(1, 300)),
    st.tuples(st.just("end"), _PLACE, st.just(0)),
)


def _damaged(raw: bytes, head: int, damages: list[tuple[str, float, Any]]) -> bytes:
    """Most damages fall into the first `head` bytes, where the structure is; the rest is weights."""
    data = bytearray(raw)
    for kind, place, what in damages:
        span = min(head, len(data)) if place < 0.9 else len(data)
        at = int(place / 0.9 * span) if place < 0.9 else int((place - 0.9) * 10 * span)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << what
        elif kind == "overwrite":
            data[at : at + len(what)] = what
        elif kind == "insert":
            data[at:at] = what
        elif kind == "cut":
            del data[at : at + int(what * 64)]
        elif kind == "double":
            data[at:at] = data[at : at + what]
        elif kind == "end":
            del data[at:]
    return bytes(data)


class Trial:
    """Opens damaged models and counts what happened."""

    def __init__(self) -> None:
        self.tried = self.opened = self.refused = 0

    def run(self, path: Path, size: int) -> None:
        self.tried += 1
        tracemalloc.start()
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint:
                    array = checkpoint[name]
                    assert array.shape == tensor_shapes(checkpoint.config)[name]
                    assert array.dtype.itemsize in (2, 4)
                    assert checkpoint.raw(name).data.nbytes <= size * 8
            self.opened += 1
        except HerdError:
            self.refused += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY_FLOOR + MEMORY_PER_BYTE * size

    def report(self, what: str, record: Callable[[str, object], None]) -> None:
        print(f"{what}: {self.tried} mutated files, {self.refused} refused, {self.opened} opened and read")
        record(f"mutations_{what}", self.tried)
        assert self.tried >= 2_000
        assert self.refused > self.tried / 4 and self.opened > self.tried / 100


@pytest.fixture
def tiny(small: Small) -> Callable[[str], tuple[LlamaConfig, dict[str, np.ndarray]]]:
    """A model of a few kilobytes: one layer, or two for a mixture."""

    def make(row: str) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
        config = replace(
            small(row)[0], dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32, vocab_size=16
        )
        return config, {name: np.ones(shape, np.float16) for name, shape in tensor_shapes(config).items()}

    return make


Tiny = Callable[[str], tuple[LlamaConfig, dict[str, np.ndarray]]]
EXAMPLES = pytest.mark.parametrize("examples", [2_200, pytest.param(22_000, marks=pytest.mark.slow)])


@EXAMPLES
def test_mutated_gguf_files(
    examples: int, tmp_path: Path, tiny: Tiny, record_property: Callable[[str, object], None]
) -> None:
    config, weights = tiny("llama3.1")
    file = save(tmp_path / "m.gguf", config, weights, format="gguf", dtype="q8_0")
    raw, trial = file.read_bytes(), Trial()
    head = raw.index(b"token_embd.weight") + 900  # the metadata and the tensor infos

    @settings(COMMON, max_examples=examples)
    @given(st.lists(DAMAGE, min_size=1, max_size=3))
    def mutate(damages: list[tuple[str, float, Any]]) -> None:
        data = _damaged(raw, head, damages)
        file.write_bytes(data)
        trial.run(file, len(data))

    mutate()
    trial.report("gguf", record_property)


@EXAMPLES
def test_mutated_safetensors_files(
    examples: int, tmp_path: Path, tiny: Tiny, record_property: Callable[[str, object], None]
) -> None:
    config, weights = tiny("llama3.1")
    directory = save(tmp_path / "hf", config, weights)
    file = directory / "model.safetensors"
    raw, trial = file.read_bytes(), Trial()
    head = 8 + int.from_bytes(raw[:8], "little")

    @settings(COMMON, max_examples=examples)
    @given(st.lists(DAMAGE, min_size=1, max_size=3), st.booleans())
    def mutate(damages: list[tuple[str, float, Any]], keep_length: bool) -> None:
        data = _damaged(raw, head, damages)
        if keep_length:  # else nearly every damage that moves bytes ends at the header's length
            data = struct.pack("<Q", max(head - 8 + len(data) - len(raw), 0)) + data[8:]
        file.write_bytes(data)
        trial.run(directory, len(data))

    mutate()
    trial.report("safetensors", record_property)


_JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_EXTREMES),
    st.integers(-3, 300),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(-1, 1 << 33), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def _exchanged(data: Any, path: list[int], value: Any) -> Any:
    """`data` with one value, chosen by `path`, replaced."""
    if path and isinstance(data, dict) and data:
        key = sorted(data)[path[0] % len(data)]
        return data | {key: _exchanged(data[key], path[1:], value)}
    if path and isinstance(data, list) and data:
        at = path[0] % len(data)
        return [*data[:at], _exchanged(data[at], path[1:], value), *data[at + 1 :]]
    return value


_PATHS = st.lists(st.integers(0, 40), min_size=1, max_size=3)


@pytest.mark.parametrize("row", ["llama3.1", "llama4-scout"])
def test_mutated_values_in_headers_and_configs(row: str, tmp_path: Path, tiny: Tiny) -> None:
    """JSON that stays JSON: values exchanged in safetensors headers, in config.json and in params.json."""
    config, weights = tiny(row)
    hf = save(tmp_path / "hf", config, weights)
    meta = save(tmp_path / "meta", config, weights, format="meta")
    tensors = hf / "model.safetensors"
    raw = tensors.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    hf_config, params = json.loads((hf / "config.json").read_text()), json.loads((meta / "params.json").read_text())
    trial = Trial()

    @settings(COMMON, max_examples=500)
    @given(st.sampled_from(["header", "config", "params"]), _PATHS, _JUNK)
    def mutate(where: str, path: list[int], value: Any) -> None:
        tensors.write_bytes(raw)
        (hf / "config.json").write_text(json.dumps(hf_config))
        if where == "header":
            text = json.dumps(_exchanged(header, path, value)).encode()
            tensors.write_bytes(len(text).to_bytes(8, "little") + text + data)
        elif where == "config":
            (hf / "config.json").write_text(json.dumps(_exchanged(hf_config, path, value)))
        else:
            (meta / "params.json").write_text(json.dumps(_exchanged(params, path, value)))
        trial.run(meta if where == "params" else hf, len(raw))

    mutate()
    assert trial.tried >= 450 and trial.refused > 100 and trial.opened > 50
    print(f"values: {trial.tried} tried, {trial.refused} refused, {trial.opened} opened and read")


@pytest.mark.parametrize("part", ["pickle", "archive"])
def test_mutated_meta_files(part: str, tmp_path: Path, tiny: Tiny) -> None:
    config, weights = tiny("llama3.1")
    directory = save(tmp_path / "meta", config, weights, format="meta")
    file = directory / "consolidated.00.pth"
    raw, trial = file.read_bytes(), Trial()
    start = raw.index(b"\x80\x02}(")
    end = raw.index(b"u.PK") + 2
    directory_start = raw.index(b"PK\x01\x02")

    @settings(COMMON, max_examples=500)
    @given(st.lists(DAMAGE, min_size=1, max_size=2))
    def mutate(damages: list[tuple[str, float, Any]]) -> None:
        if part == "pickle":
            # Same length, so that the archive around it stays sound.
            pickled = _damaged(raw[start:end], end - start, damages)[: end - start].ljust(end - start, b".")
            data = raw[:start] + pickled + raw[end:]
        else:
            tail = _damaged(raw[directory_start:], len(raw) - directory_start, damages)
            data = raw[:directory_start] + tail
        file.write_bytes(data)
        trial.run(directory, len(data))

    mutate()
    assert trial.tried >= 450 and trial.refused > 100
    print(f"{part}: {trial.tried} tried, {trial.refused} refused, {trial.opened} opened and read")
