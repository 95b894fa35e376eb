"""The block formats: decoding equals the gguf package bit for bit; encoding is good and the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from herd import HerdError
from herd.checkpoint import blocks
from herd.checkpoint.gguf import dequantize, quantize
from herd.checkpoint.numbers import BLOCKS

native = pytest.mark.skipif(blocks._native is None, reason="Herd was installed without a compiler")
SCALES = [1e-6, 0.02, 1.0, 300.0]

# Root mean squared error of normal weights, relative to theirs; what the format can do, rounded up.
ERRORS = {
    "q4_0": 0.084, "q4_1": 0.075, "q5_0": 0.042, "q5_1": 0.037, "q8_0": 0.0056, "iq4_nl": 0.077,
    "q2_k": 0.29, "q3_k": 0.148, "q4_k": 0.07, "q5_k": 0.036, "q6_k": 0.018, "iq4_xs": 0.077,
}  # fmt: skip


def reference(type_name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type_name.upper()]


def normal(rows: int = 64, columns: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def error(weights: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> float:
    """Relative error, weighed by the importance of the columns."""
    back = dequantize(type_name, quantize(type_name, weights, importance)).reshape(weights.shape)
    w = np.ones(weights.shape[-1]) if importance is None else importance
    return float(np.sqrt((w * (back - weights) ** 2).sum() / (w * weights**2).sum()))


@pytest.mark.parametrize("type_name", BLOCKS)
def test_every_block_is_read_as_the_reference_reads_it(type_name: str) -> None:
    assert BLOCKS[type_name] == gguf.GGML_QUANT_SIZES[reference(type_name)]
    raw = np.random.default_rng(0).integers(0, 256, (700, BLOCKS[type_name].bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, reference(type_name)).reshape(-1)
    found = dequantize(type_name, raw)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert found.dtype == np.float32 and same.all()


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_plain_formats_are_casts(type_name: str) -> None:
    raw = quantize(type_name, normal())
    expected = gguf.quants.quantize(normal(), reference(type_name))
    assert raw == expected.tobytes()
    back = gguf.quants.dequantize(expected, reference(type_name)).astype(np.float32)
    np.testing.assert_array_equal(dequantize(type_name, raw), back.reshape(-1))


def agrees(type_name: str, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain rules are the reference's; the compiled q8_0 follows them too."""
    expected = gguf.quants.quantize(weights, reference(type_name)).tobytes()
    if type_name == "q8_0":
        assert quantize(type_name, weights) == expected
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_native", None)
        assert quantize(type_name, weights) == expected


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_plain_rules_are_the_references(type_name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = normal(96, 128) * np.float32(scale)
    weights[0, :32] = 0  # a block of zeros
    weights[1] = np.round(weights[1] / scale * 2) / 2 * scale  # ties
    weights[2, ::2] = -weights[2, ::2].max()  # several weights of the largest magnitude, both signs
    weights[2, 1::2] *= -1
    agrees(type_name, weights, monkeypatch)


@settings(max_examples=200, deadline=None)
@given(
    type_name=st.sampled_from(["q8_0", "q4_0"]),
    weights=hnp.arrays(np.float32, (2, 64), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)),
)
def test_any_weights_follow_the_plain_rules(type_name: str, weights: np.ndarray) -> None:
    weights[np.abs(weights) < 1e-30] = 0  # below that the reference divides by zero
    with pytest.MonkeyPatch.context() as patch:
        agrees(type_name, weights, patch)


@native
@pytest.mark.parametrize("type_name", BLOCKS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_error_is_what_the_format_can_do(type_name: str, scale: float) -> None:
    if scale == 1e-6:  # float16 scales of such weights are subnormal
        assert error(normal() * np.float32(scale), type_name) <= 1
        return
    assert error(normal() * np.float32(scale), type_name) < ERRORS[type_name]


@native
@pytest.mark.parametrize("type_name", [name for name in BLOCKS if name != "q8_0"])
def test_important_columns_get_the_smaller_error(type_name: str) -> None:
    importance = np.random.default_rng(1).exponential(size=512).astype(np.float32) ** 2
    weights = normal()
    plain = dequantize(type_name, quantize(type_name, weights)).reshape(weights.shape)
    before = np.sqrt((importance * (plain - weights) ** 2).sum() / (importance * weights**2).sum())
    assert error(weights, type_name, importance) < 0.97 * before


@native
@pytest.mark.parametrize("type_name", BLOCKS)
def test_a_few_shapes_of_weights(type_name: str) -> None:
    """Zeros, equal weights, one outlier, one sign, whole numbers: nothing is lost that need not be."""
    n = BLOCKS[type_name].weights
    assert not dequantize(type_name, quantize(type_name, np.zeros((2, n), np.float32))).any()
    for value in (1.0, -1.0):
        assert error(np.full((1, n), value, np.float32), type_name) < 0.03
    outlier = np.zeros((1, n), np.float32)
    outlier[0, 7] = -3.0
    assert error(outlier, type_name) < 0.05  # the codebook has no 0
    assert error(np.abs(normal(8, n)), type_name) < 1.3 * ERRORS[type_name]
    tiny = np.full((1, n), 1e-42, np.float32)  # too small for a float16 scale, and for its inverse
    assert not dequantize(type_name, quantize(type_name, tiny)).any()


@native
@pytest.mark.parametrize("type_name", BLOCKS)
def test_every_instruction_set_and_number_of_threads_writes_the_same_bytes(type_name: str) -> None:
    code = (
        "import sys, numpy as np; from herd.checkpoint.blocks import quantize;"
        "w = np.random.default_rng(0).standard_t(4, (40, 2048)).astype(np.float32);"
        f"sys.stdout.buffer.write(quantize({type_name!r}, w, threads=1))"
    )
    weights = np.random.default_rng(0).standard_t(4, (40, 2048)).astype(np.float32)
    here = quantize(type_name, weights, threads=3)
    for isa in ("scalar", "avx2"):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"HERD_ISA": isa})
        assert result.stdout == here, (isa, result.stderr[-300:])


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", pytest.param("q4_k", marks=native)])
@pytest.mark.parametrize("compiled", [True, False])
def test_weights_that_blocks_cannot_hold_are_refused(
    type_name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(blocks, "_native", None)
        if type_name == "q4_k":
            with pytest.raises(HerdError, match="needs Herd's compiled part"):
                quantize(type_name, np.zeros((1, 256), np.float32))
            return
    weights = np.zeros((1, BLOCKS[type_name].weights), np.float32)
    for bad in (np.nan, np.inf, 1e30):
        weights[0, 5] = bad
        with pytest.raises(HerdError):
            quantize(type_name, weights)


def test_wrong_shapes_and_names_are_refused() -> None:
    with pytest.raises(HerdError, match="whole blocks"):
        quantize("q4_0", np.zeros((4, 33), np.float32))
    with pytest.raises(HerdError, match="whole blocks"):
        quantize("q4_k", np.zeros((4, 128), np.float32))
    with pytest.raises(HerdError, match="unknown block format"):
        quantize("q7_k", np.zeros((4, 32), np.float32))
    with pytest.raises(HerdError, match="made of blocks"):
        dequantize("q8_0", b"\0" * 33)
    for bad in (np.ones(31), np.full(32, np.nan), -np.ones(32)):
        with pytest.raises(HerdError, match="importance has one finite weight"):
            quantize("q4_0", np.zeros((4, 32), np.float32), bad.astype(np.float32))
