"""The engine's matrix products against float64, in every weight format and for every instruction set of this machine.

Weights come back from their packed form exactly as `herd.checkpoint.blocks` decodes them. Products of plain formats are
those of float64 up to float32 rounding; for bfloat16 weights with inputs rounded to that, where the processor has such
products. Products of block formats are too, once the inputs are rounded as the engine states it: int8 in blocks of 32,
scale max|x| / 127, halves to even. A row's bits depend on no other row.

The instruction set is chosen when a process starts (HERD_ISA): each has a process of its own that computes all cases,
with the compiled part that this one runs (make sanitize puts another in its place).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from herd.checkpoint.blocks import dequantize, quantize
from herd.checkpoint.numbers import BLOCKS, PLAIN, stored_bytes

native = pytest.importorskip("herd._native")

FORMATS = (*PLAIN, *BLOCKS)
ROWS = 17  # of inputs: groups of 8, 4, 2 and 1 rows are taken together
HIGH = 37  # of weights: two strips of 16 and five rows
NAN_ROW, INF_ROW = 3, 9
BOUND = 1e-6  # measured: 1.7e-7 of the sum of magnitudes

CHILD = """
import pickle, sys
import numpy as np
from herd import _native

def product(name, data, shape, x):
    y = np.full((len(x), shape[0]), 7.0, np.float32)
    _native.product(name, data, *shape, np.ascontiguousarray(x), y)
    return y

results = {}
for name, cases in pickle.load(open(sys.argv[1], "rb")).items():
    for kind, (data, shape, x) in cases.items():
        values = np.empty(shape, np.float32)
        _native.unpacked(name, data, values)
        results[name, kind] = {
            "values": values,
            "alone": np.concatenate([product(name, data, shape, row[None]) for row in x]),
            "together": [product(name, data, shape, x[:n]) for n in range(1, len(x) + 1)],
        }
pickle.dump((_native.isa(), results), open(sys.argv[2], "wb"))
"""


class Case(NamedTuple):
    """A matrix as it lies in a file, and inputs."""

    data: np.ndarray
    shape: tuple[int, int]
    x: np.ndarray


def columns_of(name: str) -> int:
    return 77 if name in PLAIN else 7 * 32 if BLOCKS[name].weights == 32 else 3 * 256


def inputs(columns: int, seed: int) -> np.ndarray:
    """Rows of different size; no int8 code is near a tie, so that every order of arithmetic agrees on it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (ROWS, columns)) + rng.uniform(-0.45, 0.45, (ROWS, columns))
    codes = np.clip(codes, -126.4, 126.4)
    codes[:, 31::32] = 127.0  # the largest of each block, so that a block's unit is what is multiplied with here
    unit = np.exp(rng.normal(-3, 1.5, (ROWS, -(-columns // 32)))).repeat(32, 1)[:, :columns]
    x = codes * unit
    x[1, :32] = 0.0  # a block without a largest value
    x[2] *= 1e-30
    x[4] *= 1e30
    # Halves go to even: with a largest value of 127 the codes are the inputs themselves, and these are exact ties.
    x[5] = rng.integers(-127, 127, columns) + 0.5
    x[5, 31::32] = -127.0
    return x.astype(np.float32)


def with_nan(x: np.ndarray) -> np.ndarray:
    broken = x.copy()
    broken[NAN_ROW, 40], broken[INF_ROW, -1] = np.nan, -np.inf
    return broken


def random_blocks(name: str, count: int) -> np.ndarray:
    """Bytes at random: every code and every scale that a file may hold, as far as the weights are ordinary numbers."""
    rng = np.random.default_rng(11)
    blocks = rng.integers(0, 256, (40 * count, BLOCKS[name].bytes), np.uint8)
    weights = dequantize(name, blocks).reshape(len(blocks), -1)
    with np.errstate(invalid="ignore"):
        good = blocks[np.isfinite(weights).all(1) & (np.abs(weights).max(1) < 1e4)]
    assert len(good) >= count
    return good[:count].reshape(-1)


def cases_of(name: str) -> dict[str, Case]:
    """Normal weights; the same with broken inputs; blocks of random bytes."""
    shape = (HIGH, columns_of(name))
    weights = np.random.default_rng(5).normal(0, 0.1, shape).astype(np.float32)
    data, x = np.frombuffer(quantize(name, weights), np.uint8), inputs(shape[1], 0)
    cases = {"normal": Case(data, shape, x), "broken": Case(data, shape, with_nan(x))}
    if name in BLOCKS:
        blocks = random_blocks(name, HIGH * shape[1] // BLOCKS[name].weights)
        cases["random"] = Case(blocks, shape, inputs(shape[1], 1))
    return cases


CASES = {name: cases_of(name) for name in FORMATS}


@pytest.fixture(scope="module")
def computed(on_each_isa: Callable[..., dict[str, Any]]) -> dict[str, dict[tuple[str, str], Any]]:
    """What each instruction set of this machine computes, all cases together."""
    return on_each_isa(CHILD, {n: {k: tuple(c) for k, c in cs.items()} for n, cs in CASES.items()})


@pytest.fixture
def found(isa: str, computed: dict[str, Any]) -> dict[tuple[str, str], Any]:
    results: dict[tuple[str, str], Any] = computed[isa]
    return results


def rounded(x: np.ndarray) -> np.ndarray:
    """The stated rule, in float64."""
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(2, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale).reshape(x.shape)


def bits(y: np.ndarray) -> np.ndarray:
    """Equal where two numbers are the same to the bit; one NaN is as good as another."""
    return np.where(np.isnan(y), np.float32(np.nan), y).view(np.uint32)


def expected_product(name: str, case: Case, bf16_inputs: bool) -> tuple[np.ndarray, np.ndarray]:
    """x·Wᵀ in float64, and the size of what is added up: errors are measured against it."""
    weights = dequantize(name, case.data).reshape(case.shape).astype(np.float64)
    x = rounded(case.x) if name in BLOCKS else case.x.astype(np.float64)
    if name == "bf16" and bf16_inputs:
        x = case.x.astype(PLAIN["bf16"]).astype(np.float64)
    return x @ weights.T, np.abs(x) @ np.abs(weights).T


@pytest.mark.parametrize("name", FORMATS)
def test_weights_come_back_exactly(found: dict[tuple[str, str], Any], name: str) -> None:
    for kind, case in CASES[name].items():
        values = found[name, kind]["values"]
        expected = dequantize(name, case.data).reshape(case.shape)
        np.testing.assert_array_equal(values, expected, err_msg=kind)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_float64(
    isa: str, found: dict[tuple[str, str], Any], name: str, bf16_isas: tuple[str, ...]
) -> None:
    for kind in CASES[name].keys() - {"broken"}:
        expected, size = expected_product(name, CASES[name][kind], isa in bf16_isas)
        error = np.abs(found[name, kind]["together"][-1] - expected)
        assert (error <= BOUND * size).all(), (kind, (error / size).max())


@pytest.mark.parametrize("name", FORMATS)
def test_a_rows_bits_depend_on_no_other_row(found: dict[tuple[str, str], Any], name: str) -> None:
    """In groups of any size, and beside rows that are not numbers."""
    for kind in CASES[name]:
        alone = bits(found[name, kind]["alone"])
        for n, together in enumerate(found[name, kind]["together"], 1):
            np.testing.assert_array_equal(bits(together), alone[:n], err_msg=f"{kind}, {n} rows")


@pytest.mark.parametrize("name", FORMATS)
def test_a_rows_bits_in_a_long_prompt(name: str) -> None:
    """More rows than share what is unpacked for them, and no multiple of those that do."""
    data, shape, _ = CASES[name]["normal"]
    x = np.random.default_rng(3).standard_normal((523, shape[1]), np.float32)
    together = np.empty((len(x), HIGH), np.float32)
    native.product(name, data, *shape, x, together)
    for i in (0, 7, 8, 255, 256, 511, 512, 519, 520, 522):
        alone = np.empty((1, HIGH), np.float32)
        native.product(name, data, *shape, x[i : i + 1], alone)
        np.testing.assert_array_equal(bits(together[i]), bits(alone[0]), err_msg=f"row {i}")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_is_never_hidden(found: dict[tuple[str, str], Any], name: str) -> None:
    """All outputs of a row with a NaN or an infinity say so, and only those."""
    y = found[name, "broken"]["together"][-1]
    assert np.isnan(y[NAN_ROW]).all() and not np.isfinite(y[INF_ROW]).any()
    whole = np.delete(np.arange(ROWS), [NAN_ROW, INF_ROW])
    assert np.isfinite(y[whole]).all()
    np.testing.assert_array_equal(y[whole], found[name, "normal"]["together"][-1][whole])


@pytest.mark.parametrize("name", BLOCKS)
def test_inputs_next_to_nothing_give_next_to_nothing(name: str) -> None:
    """127 / 1e-38 is infinite."""
    data, shape, _ = CASES[name]["normal"]
    x, y = np.full((1, shape[1]), 1e-38, np.float32), np.empty((1, shape[0]), np.float32)
    native.product(name, data, *shape, x, y)
    assert (np.abs(y) <= 2e-38 * np.abs(dequantize(name, data).reshape(shape)).sum(1)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_instruction_sets_agree(computed: dict[str, Any], name: str, bf16_isas: tuple[str, ...]) -> None:
    for kind in CASES[name].keys() - {"broken"}:
        _, size = expected_product(name, CASES[name][kind], False)
        for isa, results in computed.items():
            gap = results[name, kind]["together"][-1] - computed["scalar"][name, kind]["together"][-1]
            bound = 2**-8 if name == "bf16" and isa in bf16_isas else BOUND
            assert (np.abs(gap) <= bound * size).all()


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_take_hardly_more_than_a_file(name: str) -> None:
    """Tiles round nothing up but scales and headers; odd shapes are filled up to whole tiles."""
    assert stored_bytes(name, (4096, 4096)) <= native.packed_bytes(name, 4096, 4096)
    assert native.packed_bytes(name, 4096, 4096) <= 1.04 * stored_bytes(name, (4096, 4096))
    width = 256 if name in BLOCKS else 32
    assert (
        native.packed_bytes(name, 1, 1) <= native.packed_bytes(name, 16, width) == native.packed_bytes(name, 1, width)
    )


def test_wrong_shapes_and_names_are_refused() -> None:
    data, x, y = np.zeros(4 * 6, np.uint8), np.zeros((2, 3), np.float32), np.zeros((2, 2), np.float32)
    native.product("f32", data, 2, 3, x, y)
    for wrong in (("f64", data, 2, 3, x, y), ("f32", data[:-1], 2, 3, x, y), ("f32", data, 2, 3, x[:, :2].copy(), y),
                  ("f32", data, 2, 3, x, y[:1])):  # fmt: skip
        with pytest.raises(ValueError):
            native.product(*wrong)
    with pytest.raises(ValueError):
        native.unpacked("q4_0", np.zeros(17, np.uint8), np.zeros((1, 32), np.float32))
