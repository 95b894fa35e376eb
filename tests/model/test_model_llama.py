"""The module itself: names, initialisation, mixture of experts, cache, precision, compilation, files."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from herd.architecture import LlamaConfig, MoeConfig, parameter_count, tensor_shapes  # noqa: E402
from herd.errors import ContextLengthExceeded, HerdError, UsageError  # noqa: E402
from herd.model import KVCache, Llama, from_arrays, load, state_arrays, to_array, to_tensor  # noqa: E402
from herd.model.moe import MixtureOfExperts, grouped_linear  # noqa: E402

DENSE = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=64)
LLAMA4 = dataclasses.replace(
    DENSE,
    n_layers=4,
    moe=MoeConfig(n_experts=4, ffn_dim=24, interleave=2),
    nope_interval=4,
    attention_chunk=16,
    qk_norm=True,
    generation="llama4",
)
TIED = dataclasses.replace(DENSE, tied_embeddings=True)


def _model(config, seed=0):
    model = Llama(config)
    model.init_weights(seed)
    return model


def _tokens(*shape):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", [DENSE, TIED, LLAMA4], ids=["dense", "tied", "llama4"])
def test_names_shapes_and_order_are_the_canonical_ones(config):
    model = Llama(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(state.items()) == list(tensor_shapes(config).items())
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    assert (model.output_weight is model.embed.weight) == config.tied_embeddings


def test_initialisation_is_reproducible_and_has_the_stated_spread():
    config = dataclasses.replace(LLAMA4, dim=128, vocab_size=512)
    a, b, other = (dict(_model(config, seed).named_parameters()) for seed in (1, 1, 2))
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name])
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
            continue
        assert not torch.equal(tensor, other[name])
        back = name.endswith((".wo.weight", ".w2.weight", ".w2"))
        wanted = 0.02 / math.sqrt(2 * config.n_layers) if back else 0.02
        assert float(tensor.detach().std()) == pytest.approx(wanted, rel=0.15), name
    assert not torch.equal(a["layers.0.attention.wk.weight"], a["layers.1.attention.wk.weight"])


def test_mixture_of_experts_equals_running_every_expert():
    torch.manual_seed(0)
    moe = MixtureOfExperts(16, MoeConfig(n_experts=5, ffn_dim=8, top_k=2))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 9, 16, requires_grad=True)
    got = moe(x)
    logits = moe.router(x)
    chosen = torch.full_like(logits, -math.inf).scatter(-1, logits.topk(2).indices, logits.topk(2).values)
    wanted = moe.shared(x)
    for e in range(5):
        inner = x * chosen[..., e : e + 1].sigmoid()  # 0 for experts that were not chosen, which then give 0
        weights = moe.experts
        wanted = (
            wanted + (torch.nn.functional.silu(inner @ weights.w1[e].T) * (inner @ weights.w3[e].T)) @ weights.w2[e].T
        )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    grad = torch.randn_like(got)
    leaves = [x, *moe.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_grouped_linear_gradients_and_registration():
    counts = torch.tensor([3, 0, 2])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))
    torch.library.opcheck(grouped_linear, (x, weight, counts))


def test_cache_rows_are_independent():
    model = _model(DENSE).eval()
    tokens = _tokens(3, 12)
    cache = KVCache(DENSE, 3, 12)
    with torch.no_grad():
        full = model(tokens)
        model(tokens[:, :6], cache=cache, lengths=[6, 2, 0])
        pair = cache.select([2, 0])
        logits = model(torch.stack([tokens[2, :3], tokens[0, 6:9]]), cache=pair)
        torch.testing.assert_close(logits[0], full[2, :3], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[1], full[0, 6:9], atol=1e-5, rtol=1e-4)
        assert cache.lengths == [9, 2, 3] and pair.lengths == [3, 9]
        cache.copy_row(0, 1)
        cache.truncate([4, 9, 0])
        logits = model(torch.stack([tokens[0, 4:6], tokens[0, 9:11]]), cache=cache.select([0, 1]))
        torch.testing.assert_close(logits[0], full[0, 4:6], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[1], full[0, 9:11], atol=1e-5, rtol=1e-4)


def test_a_full_cache_says_so_and_changes_nothing():
    model = _model(DENSE)
    cache = KVCache(DENSE, 1, 4)
    model(_tokens(1, 3), cache=cache)
    with pytest.raises(ContextLengthExceeded) as caught:
        model(_tokens(1, 2), cache=cache)
    assert (caught.value.needed, caught.value.allowed_tokens) == (5, 4)
    assert cache.lengths == [3]


def test_contradictory_arguments_are_usage_errors():
    model, tokens = _model(DENSE), _tokens(1, 4)
    with pytest.raises(UsageError, match="cache"):
        model(tokens, lengths=[4])
    with pytest.raises(UsageError, match="positions"):
        model(tokens, cache=KVCache(DENSE, 1, 8), document_ids_BS=torch.zeros(1, 4))
    with pytest.raises(UsageError, match="truncate"):
        KVCache(DENSE, 1, 8).truncate([1])
    with pytest.raises(UsageError, match="rows"):
        KVCache(DENSE, 2, 8).select([0, 0])
    with pytest.raises(UsageError, match="one number per row"):
        model(tokens, cache=KVCache(DENSE, 2, 8))


def test_given_positions_move_the_rotation_only_relatively():
    model, tokens = _model(DENSE), _tokens(1, 10)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(10)  # fresh weights hardly attend
        plain = model(tokens)
        shifted = model(tokens, positions_BS=torch.arange(10)[None] + 1000)
        spread = model(tokens, positions_BS=torch.arange(10)[None] * 7)
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)  # RoPE knows distances only
    assert (spread - plain).abs().max() > 1e-3


@pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["dense", "llama4"])
def test_bfloat16_autocast_learns_in_the_same_direction(config):
    model = _model(config)
    tokens = _tokens(2, 40)
    ids = torch.tensor([[0] * 17 + [1] * 23, [0] * 40])

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(tokens, document_ids_BS=ids)
        assert logits.dtype == torch.float32
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.cosine_similarity(gradients(True), gradients(False), dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["dense", "llama4"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_blocks_compile_as_one_graph_each(config, autocast):
    torch._dynamo.reset()
    eager = _model(config)
    compiled = copy.deepcopy(eager)
    for block in compiled.layers:
        block.compile(fullgraph=True)
    tokens, ids = _tokens(2, 70), torch.tensor([[0] * 30 + [1] * 40, [0] * 70])
    for documents in (ids, None):
        got = []
        for model in (eager, compiled):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(tokens, document_ids_BS=documents)
            logits.square().sum().backward()
            got.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        tolerance = 5e-2 if autocast else 1e-4
        for a, b in zip(*got, strict=True):
            assert float((a - b).norm() / a.norm()) < tolerance
    assert [name for name, _ in state_arrays(compiled)] == list(tensor_shapes(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arrays_round_trip_bit_exactly(dtype):
    tensor = torch.randn(5, 7).to(dtype)
    back = to_tensor(to_array(tensor))
    assert back.dtype == dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("form", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("config", [DENSE, TIED], ids=["dense", "tied"])
def test_load_reads_what_checkpoint_saves(form, config, tmp_path):
    from herd.checkpoint import save

    if form == "meta":  # the reference's params.json can only express its own widths
        config = dataclasses.replace(config, ffn_dim=256, tied_embeddings=False)
    model = _model(config).eval()
    path = tmp_path / ("model.gguf" if form == "gguf" else "model")
    save(path, config, state_arrays(model), format=form, dtype="f32")
    tokens = _tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load(path)(tokens), model(tokens))
    assert load(path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_missing_and_misshapen_tensors_are_named():
    arrays = dict(state_arrays(_model(DENSE)))
    wrong = {**arrays, "norm.weight": np.ones(3, np.float32)}
    with pytest.raises(HerdError, match=r"norm\.weight"):
        from_arrays(DENSE, wrong)
    del arrays["layers.1.attention.wo.weight"]
    with pytest.raises(HerdError, match=r"layers\.1\.attention\.wo\.weight"):
        from_arrays(DENSE, arrays)
