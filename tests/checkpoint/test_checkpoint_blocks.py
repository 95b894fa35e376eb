"""The block formats against the gguf package's reference quantiser, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from herd import HerdError
from herd.checkpoint.gguf import dequantize, quantize

REFERENCE = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "f16": gguf.GGMLQuantizationType.F16,
    "f32": gguf.GGMLQuantizationType.F32,
}


def _agrees(type_name: str, weights: np.ndarray) -> None:
    expected = gguf.quants.quantize(weights, REFERENCE[type_name])
    raw = quantize(type_name, weights)
    assert raw == expected.tobytes()
    back = gguf.quants.dequantize(expected, REFERENCE[type_name])
    np.testing.assert_array_equal(dequantize(type_name, raw), back.reshape(-1).astype(np.float32))


@pytest.mark.parametrize("type_name", REFERENCE)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 300.0])
def test_random_weights_quantise_as_the_reference(type_name: str, scale: float) -> None:
    weights = (np.random.default_rng(3).standard_normal((96, 128)) * scale).astype(np.float32)
    weights[0, :32] = 0  # a block of zeros
    weights[1] = np.round(weights[1] / scale * 2) / 2 * scale  # ties
    weights[2, ::2] = -weights[2, ::2].max()  # several weights of the largest magnitude, both signs
    weights[2, 1::2] *= -1
    _agrees(type_name, weights)


@settings(max_examples=200, deadline=None)
@given(
    type_name=st.sampled_from(["q8_0", "q4_0"]),
    weights=hnp.arrays(np.float32, (2, 64), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)),
)
def test_any_weights_quantise_as_the_reference(type_name: str, weights: np.ndarray) -> None:
    weights[np.abs(weights) < 1e-30] = 0  # below that the reference divides by zero
    _agrees(type_name, weights)


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_every_stored_block_is_read_as_the_reference_reads_it(type_name: str) -> None:
    random = np.random.default_rng(0)
    size = 34 if type_name == "q8_0" else 18
    raw = random.integers(0, 256, (500, size), np.uint8)
    raw[:, 1] &= 0x7B  # finite, positive scales
    expected = gguf.quants.dequantize(raw, REFERENCE[type_name])
    np.testing.assert_array_equal(dequantize(type_name, raw).reshape(500, 32), expected)


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_weights_that_blocks_cannot_hold_are_refused(type_name: str) -> None:
    weights = np.zeros((1, 32), np.float32)
    for bad in (np.nan, np.inf, 1e30):
        weights[0, 5] = bad
        with pytest.raises(HerdError):
            quantize(type_name, weights)
    with pytest.raises(HerdError, match="whole blocks"):
        quantize(type_name, np.zeros((4, 33), np.float32))
    with pytest.raises(HerdError, match="unknown block format"):
        quantize("q5_k", np.zeros((4, 32), np.float32))
    with pytest.raises(HerdError, match="made of blocks"):
        dequantize(type_name, b"\0" * 33)
    # A block whose scale is too small for float16, and even for its inverse, is a block of zeros.
    weights[0, 5] = 1e-42
    assert not dequantize(type_name, quantize(type_name, weights)).any()


@pytest.mark.parametrize(("type_name", "bound"), [("q8_0", 1 / 127 / 2), ("q4_0", 1 / 8)])
def test_the_error_is_within_half_a_step(type_name: str, bound: float) -> None:
    """q8_0 rounds to the nearest of 255 levels; q4_0's positive end is cut at 7 of 8 steps, hence a whole step."""
    weights = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    back = dequantize(type_name, quantize(type_name, weights)).reshape(-1, 32)
    largest = np.abs(weights).reshape(-1, 32).max(axis=1, keepdims=True)
    rounded_scale = 2**-11  # float16 has 11 bits
    assert (np.abs(back - weights.reshape(-1, 32)) <= largest * (bound + rounded_scale) * 1.001).all()
