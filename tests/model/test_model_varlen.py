"""Packed rows and chunks by torch's variable-length attention on a GPU: no mask, the same numbers.

Without a GPU the kernel itself cannot run. What it is told is checked by an attention that does what torch's
documentation of it says, and that torch takes the call, by tensors that have shapes only (the device "meta").
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from herd.architecture import LlamaConfig  # noqa: E402
from herd.model import AttentionMask, Llama, attend, varlen_attention  # noqa: E402
from herd.model.attention import choose_lowering  # noqa: E402
from herd.model.llama import Places  # noqa: E402
from herd.train.recompute import recompute  # noqa: E402

BATCH, LENGTH = 3, 90
KERNEL = "_varlen_attn.default"


def _documents(seed=0, length=LENGTH):
    return (torch.rand(BATCH, length, generator=torch.Generator().manual_seed(seed)) < 0.06).cumsum(1)


MASKS = {
    "documents": AttentionMask(document_ids_BS=_documents()),
    "chunks, alike in all rows": AttentionMask(chunk=25),
    "documents and chunks": AttentionMask(document_ids_BS=_documents(), chunk=7),
    "chunks from given positions": AttentionMask(chunk=25, positions_BS=torch.arange(LENGTH)[None] + 33),
    "documents with ids that return": AttentionMask(document_ids_BS=_documents() % 2),
}


@pytest.fixture
def documented(monkeypatch):
    """torch's kernel, as its documentation says: every sequence alone, causal where the window is (-1, 0)."""

    def attention(q_THK, k_TGK, v_TGK, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert cu_q[0] == 0 and cu_q[-1] == len(q_THK) and (cu_q.diff() > 0).all()
        assert max_q == max_k >= cu_q.diff().max() and window_size == (-1, 0) and enable_gqa
        outputs = []
        for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            q, k, v = (x[begin:end].transpose(0, 1) for x in (q_THK, k_TGK, v_TGK))
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            hidden = torch.ones(end - begin, end - begin).triu(1).bool()
            outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", attention)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_the_kernels_part_is_the_dense_mask_and_so_are_its_gradients(documented, name, heads):
    ranges = MASKS[name].key_ranges(LENGTH)
    generator = torch.Generator().manual_seed(1)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    *inputs, grad = (torch.randn(BATCH, LENGTH, n, 8, generator=generator, dtype=torch.float64) for n in sizes)
    found = []
    for lowering, mask in (("dense", ranges), ("varlen", ranges.in_runs())):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, mask, lowering=lowering)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_runs_are_where_a_query_sees_nothing_before_itself(name):
    ranges = MASKS[name].key_ranges(LENGTH)
    sees = ranges.dense(LENGTH)
    alone = [
        row * LENGTH + i for row in range(len(sees)) for i in range(LENGTH) if sees[row, i].nonzero().tolist() == [[i]]
    ]
    runs = ranges.in_runs().runs_R
    assert runs is not None and runs.tolist() == alone


def test_rows_of_one_document_each_are_plain_causal():
    ranges = AttentionMask(document_ids_BS=torch.full((BATCH, LENGTH), 7)).key_ranges(LENGTH)
    assert not ranges.plain_causal and ranges.in_runs().plain_causal and ranges.in_runs().runs_R is None


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(cached=[5] * BATCH), AttentionMask(causal=False, document_ids_BS=_documents())],
    ids=["cache", "both ways"],
)
def test_other_masks_have_no_runs(mask):
    ranges = mask.key_ranges(LENGTH, LENGTH + 5 if mask.cached else None)
    assert ranges.in_runs() is ranges


def test_masks_on_a_cpu_are_not_split_into_runs_and_never_reach_the_kernel():
    for mask in MASKS.values():
        ranges = mask.key_ranges(LENGTH)
        assert ranges.runs_R is None
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(BATCH, LENGTH, 2, 16, dtype=dtype)
            assert choose_lowering(q, q, ranges) in ("native", "per_document")


@pytest.mark.parametrize(
    ("dtype", "width", "chosen"),
    [
        (torch.bfloat16, 128, "varlen"),
        (torch.float16, 64, "varlen"),
        (torch.float32, 128, "dense"),
        (torch.bfloat16, 60, "dense"),
        (torch.bfloat16, 256, "dense"),
    ],
)
def test_what_a_gpu_is_given(dtype, width, chosen):
    """Shapes of a forward and backward pass through the lowering that is chosen, by torch's own operators."""
    ranges = _shapes_of(MASKS["documents and chunks"].key_ranges(LENGTH).in_runs())
    q, k, v = (
        torch.empty(BATCH, LENGTH, heads, width, dtype=dtype, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    assert choose_lowering(q, k, ranges) == chosen
    with _Operators() as seen:
        out = attend(q, k, v, ranges)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and out.dtype == dtype
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    assert (KERNEL in seen.names) == ("_varlen_attn_backward.default" in seen.names) == (chosen == "varlen")
    assert any(shape[-2:] == (LENGTH, LENGTH) for shape in seen.shapes) == (chosen == "dense"), "a mask of all pairs"


def test_one_compiled_graph_serves_any_number_of_documents():
    """Blocks are compiled for fixed sizes, and limits on the number of graphs are low."""
    config = LlamaConfig(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64, context_length=LENGTH
    )
    model = Llama(config).bfloat16()
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    block = model.layers[0].to("meta")
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target).split(".", 1)[-1] for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    torch._dynamo.reset()
    block.compile(dynamic=False, fullgraph=True, backend=backend)
    runs = set()
    for seed in range(5):
        places = model.places(tokens, _documents(seed))
        there = _shapes_of(places.local.in_runs())
        runs.add(len(there.runs_R))
        places = Places(type(places.turn)(*(x.to("meta") for x in places.turn)), there, there, None)
        x = torch.empty(BATCH, LENGTH, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        block(x, places).sum().backward()
    torch._dynamo.reset()
    assert len(runs) == 5
    assert len(graphs) == 1
    assert "_varlen_attn" in graphs[0] and not {"ge", "le"} & graphs[0]


@pytest.mark.parametrize(("what", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_the_kernel_is_run_again_for_the_backward_pass_only_where_everything_is(what, times):
    config = LlamaConfig(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64, context_length=LENGTH
    )
    model = Llama(config).bfloat16()
    recompute(model, what)
    places = model.places(torch.zeros(BATCH, LENGTH, dtype=torch.long), _documents())
    model.to("meta")
    there = _shapes_of(places.local.in_runs())
    places = Places(type(places.turn)(*(x.to("meta") for x in places.turn)), there, there, None)
    x = torch.empty(BATCH, LENGTH, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with _Operators() as seen:
        model.layers[0](x, places).sum().backward()
    assert seen.names.count(KERNEL) == times


@pytest.mark.skipif(
    not (torch.cuda.is_available() and varlen_attention.available(torch.device("cuda"))),
    reason="there is no GPU with this kernel",
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", MASKS)
def test_a_gpu_gives_the_dense_masks_numbers_and_gradients(name, compiled):
    """As exact as torch's dense attention in the same numbers, against it in fp64."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    *inputs, grad = (torch.randn(BATCH, LENGTH, n, 64, generator=generator).bfloat16().cuda() for n in (4, 2, 2, 4))
    mask = MASKS[name]
    parts = {"document_ids_BS": mask.document_ids_BS, "positions_BS": mask.positions_BS}
    parts = {key: None if x is None else x.cuda() for key, x in parts.items()}
    ranges = AttentionMask(chunk=mask.chunk, **parts).key_ranges(LENGTH, device=torch.device("cuda"))
    assert choose_lowering(inputs[0], inputs[1], ranges) == "varlen"

    def run(lowering, dtype):
        function = torch.compile(attend, dynamic=False) if compiled and lowering is None else attend
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, ranges, lowering=lowering)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))]

    exact = run("dense", torch.float64)
    for got, dense, wanted in zip(run(None, torch.bfloat16), run("dense", torch.bfloat16), exact, strict=True):
        assert (got - wanted).norm() < 1.5 * (dense - wanted).norm() + 1e-3 * wanted.norm()


def _shapes_of(ranges):
    """The ranges without their numbers."""
    first, last, runs = (
        torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (ranges.first_BS, ranges.last_BS, ranges.runs_R)
    )
    if hasattr(ranges.runs_R, "_dynamo_weak_dynamic_indices"):
        torch._dynamo.maybe_mark_dynamic(runs, 0)
    return replace(ranges, first_BS=first, last_BS=last, runs_R=runs)


class _Operators(TorchDispatchMode):
    """The operators that run, and the shapes of what they give."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).split(".", 1)[-1])
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.shapes += [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor)]
        return result
