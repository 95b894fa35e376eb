"""Every lowering of `attend` gives the dense oracle's numbers and gradients; the mask is a brute force's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from herd.errors import UsageError  # noqa: E402
from herd.model import (  # noqa: E402
    AttentionMask,
    attend,
    native_attention,
)
from herd.model.attention import choose_lowering  # noqa: E402

SHAPES = [(3, 200, 4, 2, 16), (2, 64, 2, 2, 32), (1, 1, 2, 1, 16), (2, 150, 8, 1, 48), (2, 300, 4, 4, 64)]
needs_native = pytest.mark.skipif(
    not native_attention.available(torch.zeros(1, 1, 1, 16)), reason="the native module is not built"
)


def _documents(batch, length, seed=0):
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.06).cumsum(1)


def _masks(batch, length):
    ids = _documents(batch, length)
    return {
        "causal": AttentionMask(),
        "documents": AttentionMask(document_ids_BS=ids),
        "same documents in every row": AttentionMask(document_ids_BS=ids[:1].expand(batch, -1)),
        "chunks": AttentionMask(chunk=50),
        "documents and chunks": AttentionMask(document_ids_BS=ids, chunk=7),
        "chunks from given positions": AttentionMask(chunk=50, positions_BS=torch.arange(length)[None] + 33),
        "both ways": AttentionMask(causal=False),
        "documents, both ways": AttentionMask(causal=False, document_ids_BS=ids),
    }


def _run(lowering, mask, q, k, v, grad):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, mask, lowering=lowering)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def _inputs(batch, length, heads, kv_heads, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(batch, length, n, width, generator=generator).to(dtype) for n in sizes]


def _lowerings(ranges, q):
    names = ["per_document"] if ranges.causal else []
    names += ["causal"] if ranges.plain_causal else []
    return names + (["native"] if ranges.causal and native_attention.available(q) else [])


@pytest.mark.parametrize("shape", SHAPES)
def test_lowerings_agree_with_the_dense_oracle(shape):
    batch, length, *_ = shape
    q, k, v, grad = _inputs(*shape)
    for name, mask in _masks(batch, length).items():
        expected = _run("dense", mask, q, k, v, grad)
        for lowering in [*_lowerings(mask.key_ranges(length), q), None]:
            for got, wanted in zip(_run(lowering, mask, q, k, v, grad), expected, strict=True):
                assert float((got - wanted).norm() / wanted.norm().clamp(min=1)) < 1e-5, (lowering, name)
                torch.testing.assert_close(got, wanted, atol=5e-5, rtol=1e-4, msg=f"{lowering}, {name}")


def test_the_dense_oracle_is_softmax_over_a_brute_force_mask():
    batch, length, chunk = 2, 40, 7
    q, k, v, _ = _inputs(batch, length, 4, 2, 8)
    ids = _documents(batch, length)
    got = attend(q, k, v, AttentionMask(document_ids_BS=ids, chunk=chunk), lowering="dense")
    for b in range(batch):
        for i in range(length):
            start = next(s for s in range(i + 1) if len(set(ids[b, s : i + 1].tolist())) == 1)
            seen = [j for j in range(start, i + 1) if (j - start) // chunk == (i - start) // chunk]
            for h in range(4):
                weights = (k[b, seen, h // 2] @ q[b, i, h] / 8**0.5).softmax(0)
                torch.testing.assert_close(got[b, i, h], weights @ v[b, seen, h // 2], atol=1e-5, rtol=1e-5)


@needs_native
def test_native_in_bfloat16_is_as_exact_as_torch():
    q, k, v, grad = _inputs(2, 256, 8, 4, 32, torch.bfloat16)
    mask = AttentionMask(document_ids_BS=_documents(2, 256))
    exact = _run("dense", mask, q.double(), k.double(), v.double(), grad.double())
    for lowering in ("per_document", "native"):
        for got, wanted in zip(_run(lowering, mask, q, k, v, grad), exact, strict=True):
            assert float((got.double() - wanted).norm() / wanted.norm()) < 0.008, lowering


_ON_ONE_SET = """
import sys, torch
from herd import _native
from herd.model import AttentionMask, attend
results = []
for inputs, mask_ids in torch.load(sys.argv[1]):
    results.append([])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad = (x.to(dtype).requires_grad_() for x in inputs)
        out = attend(q, k, v, AttentionMask(document_ids_BS=mask_ids), lowering="native")
        isa = _native.attention_isa(dtype == torch.bfloat16)
        results[-1].append([isa, out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
torch.save(results, sys.argv[2])
"""


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_every_kernel_set_gives_the_oracles_numbers(isa, tmp_path):
    """Also where rows and positions leave a remainder in pairs, vectors and tiles, and for the widest heads."""
    cases = [((2, 150, 4, 2, 48)), (1, 129, 3, 1, 80), (1, 65, 2, 2, 256), (1, 131, 2, 1, 144), (2, 3, 2, 1, 16)]
    saved = [(_inputs(*shape), _documents(shape[0], shape[1])) for shape in cases]
    torch.save(saved, tmp_path / "in.pt")
    command = [sys.executable, "-c", _ON_ONE_SET, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    # Memory is filled with a pattern: what nobody wrote must not reach a result.
    subprocess.run(command, check=True, env=os.environ | {"HERD_ISA": isa, "MALLOC_PERTURB_": "129"})
    for (inputs, ids), (in_float32, in_bfloat16) in zip(saved, torch.load(tmp_path / "out.pt"), strict=True):
        if in_bfloat16[0] != isa:
            pytest.skip(f"this processor has no {isa}")
        exact = _run("dense", AttentionMask(document_ids_BS=ids), *(x.double() for x in inputs))
        for (used, *got), bound in ((in_float32, 2e-6), (in_bfloat16, 0.01)):
            for values, wanted in zip(got, exact, strict=True):
                assert float((values.double() - wanted).norm() / wanted.norm()) < bound, (used, inputs[0].shape)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_reaches_all_that_see_it_and_nobody_else(dtype):
    q, k, v, _ = _inputs(1, 130, 2, 2, 32, dtype)
    k[0, 3, 0] = float("nan")
    unseen = torch.zeros(1, 130, 2, dtype=torch.bool)
    unseen[0, 3:, 0] = True
    assert torch.equal(attend(q, k, v, AttentionMask(), lowering="native").isnan().any(-1), unseen)


@needs_native
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused(scale):
    q, k, v, _ = _inputs(1, 4, 1, 1, 16)
    with pytest.raises(ValueError, match="scale"):
        torch.ops.herd.causal_attention(q, k, v, torch.zeros(1, 4, dtype=torch.int32), scale)


@needs_native
def test_native_takes_views_and_does_not_depend_on_threads():
    q, k, v, grad = _inputs(2, 130, 4, 2, 32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad)]
    mask = AttentionMask(chunk=50)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results += [_run("native", mask, q, k, v, grad), _run("native", mask, *strided)]
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_lowering_follows_device_width_and_mask():
    q, k = torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4)
    causal, documents = AttentionMask().key_ranges(8), AttentionMask(document_ids_BS=_documents(1, 8)).key_ranges(8)
    cached = AttentionMask(cached=[3]).key_ranges(1, 4)
    assert choose_lowering(q, k, causal) == "causal"  # 4 is no multiple of 16
    assert choose_lowering(q, k, documents) == "per_document"
    assert choose_lowering(q[:, :1], k[:, :4], cached) == "dense"
    assert choose_lowering(q.to("meta"), k.to("meta"), documents) == "dense"
    wide = torch.zeros(1, 8, 2, 16)
    if native_attention.available(wide):
        assert choose_lowering(wide, wide, documents) == "native"
        assert choose_lowering(wide, wide, AttentionMask(causal=False).key_ranges(8)) == "dense"


def test_a_cache_takes_no_documents():
    with pytest.raises(UsageError, match="one causal document"):
        AttentionMask(document_ids_BS=torch.zeros(1, 2), cached=[3]).key_ranges(2, 5)
