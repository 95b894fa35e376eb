"""Attention over the cache against float64: every instruction set, kind of cache, head width and length of text.

Keys and values are rounded as the cache stores them; with bfloat16 products queries and weights are rounded too, which
the bound allows for. The pages were used before, by keys that are no numbers and values that are huge, and lie in no
order. A row's bits must not depend on the rows that are computed with it, nor on what follows in its pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("herd._native")

from herd.checkpoint.numbers import PLAIN

KVS = ("f32", "bf16", "int8")
# Head width, query heads of a key head, tokens in the cache, of them rows that ask, chunk, tokens of a page.
CASES = [
    (64, 4, 600, 40, 0, 64),  # Llama 3.2 1B; softmax taken in three parts
    (128, 8, 300, 5, 0, 64),
    (128, 1, 257, 9, 0, 16),
    (64, 5, 513, 20, 300, 32),  # windows that begin within a tile of keys
    (80, 3, 256, 33, 0, 16),
    (72, 40, 255, 2, 24, 16),
    (64, 4, 270, 20, 24, 16),  # rows whose window begins behind all keys that are taken first
    (40, 2, 17, 17, 0, 16),
    (18, 3, 65, 65, 24, 48),
    (2, 1, 31, 31, 0, 16),
    (272, 2, 270, 3, 0, 16),
    (1024, 1, 16, 2, 0, 16),
    (64, 4, 1, 1, 0, 16),
]
# Of the largest |value|: with 32-bit arithmetic, and with that of bfloat16 (measured: 9e-7, 3.2e-3).
BOUND, BF16_BOUND = 2e-6, 6e-3

CHILD = """
import pickle, sys
import numpy as np
from herd import _native

def attend(cache, pages, keys, values, queries, chunk):
    out = np.full(queries.shape, 7.0, np.float32)
    cache.attend(pages, keys, values, queries, chunk, out)
    return out

results = {}
cases, kvs = pickle.load(open(sys.argv[1], "rb"))
for i, (keys, values, queries, chunk, page_tokens) in enumerate(cases):
    tokens, width = keys.shape
    n_pages = -(-tokens // page_tokens)
    pages = np.random.default_rng(i).permutation(n_pages + 3)[:n_pages].astype(np.int32)
    whole = n_pages * page_tokens
    for kv in kvs:
        cache = _native.Cache(kv, 1, 1, width, page_tokens, n_pages + 3)
        used = np.full((whole, width), np.nan, np.float32), np.full((whole, width), 3e38, np.float32)
        attend(cache, pages, *used, queries[:1], 0)
        together = attend(cache, pages, keys, values, queries, chunk)
        rows = len(queries)
        alone = []
        for t in range(rows):
            until = tokens - rows + t + 1
            alone.append(attend(cache, pages, keys[:until], values[:until], queries[t : t + 1], chunk))
        broken = {}
        for name, number in {"nan": np.nan, "inf": np.inf, "too large for bfloat16": 3.4e38}.items():
            unusable = values.copy()
            unusable[tokens - rows // 2 - 1, width // 2] = number
            broken[name] = attend(cache, pages, keys, unusable, queries, chunk)
        results[i, kv] = {"together": together, "alone": np.concatenate(alone), "broken": broken}
pickle.dump((_native.isa(), results), open(sys.argv[2], "wb"))
"""


def inputs(case: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Keys, values and queries with scores of some units, so that the softmax is neither flat nor one."""
    width, heads, tokens, rows, chunk, page_tokens = case
    rng = np.random.default_rng(width + tokens)
    keys, values, queries = (rng.normal(0, 1.5, s) for s in ((tokens, width), (tokens, width), (rows, heads, width)))
    return keys.astype(np.float32), values.astype(np.float32), queries.astype(np.float32), chunk, page_tokens


def stored(x: np.ndarray, kv: str) -> np.ndarray:
    """What the cache keeps of rows of keys or values."""
    if kv == "int8":
        largest = np.abs(x).max(-1, keepdims=True)
        return np.rint(x * (np.float32(127) / largest)).astype(np.float64) * (largest / np.float32(127))
    return x.astype(PLAIN[kv]).astype(np.float64)


def expected(case: tuple[int, ...], kv: str) -> np.ndarray:
    """softmax(q·k / sqrt(D))·v in float64 over the keys of a row's chunk up to its own: [T, H, D]."""
    keys, values, queries, chunk, _ = inputs(case)
    keys, values, rows = stored(keys, kv), stored(values, kv), []
    for t, query in enumerate(queries.astype(np.float64)):
        position = len(keys) - len(queries) + t
        seen = slice(position // chunk * chunk if chunk else 0, position + 1)
        scores = query @ keys[seen].T / np.sqrt(keys.shape[1])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        rows.append(weights / weights.sum(1, keepdims=True) @ values[seen])
    return np.stack(rows)


@pytest.fixture(scope="module")
def computed(on_each_isa: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return on_each_isa(CHILD, ([inputs(case) for case in CASES], KVS))


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_of_float64(
    isa: str, case: tuple[int, ...], kv: str, computed: dict[str, Any], bf16_isas: tuple[str, ...]
) -> None:
    found = computed[isa][CASES.index(case), kv]["together"]
    error = np.abs(found - expected(case, kv)).max() / np.abs(inputs(case)[1]).max()
    assert error <= (BF16_BOUND if kv == "bf16" and isa in bf16_isas else BOUND)


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rows_bits_are_its_own(isa: str, case: tuple[int, ...], kv: str, computed: dict[str, Any]) -> None:
    found = computed[isa][CASES.index(case), kv]
    np.testing.assert_array_equal(found["together"].view(np.uint32), found["alone"].view(np.uint32))


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unusable_value_harms_who_sees_it(
    isa: str, case: tuple[int, ...], kv: str, computed: dict[str, Any]
) -> None:
    """All of their outputs say so; those before it, and those of the next chunk, keep their bits."""
    _, _, tokens, rows, chunk, _ = case
    found = computed[isa][CASES.index(case), kv]
    position, at = np.arange(tokens - rows, tokens), tokens - rows // 2 - 1
    sees = (position >= at) & (position // chunk == at // chunk if chunk else True)
    for broken in found["broken"].values():
        assert np.isnan(broken[sees]).all()
        np.testing.assert_array_equal(broken[~sees], found["together"][~sees])
