"""Pruning: a model whose other parts do nothing is found again inside a larger one, to the last digit that matters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from herd import checkpoint, tokenizer
from herd.architecture import LlamaConfig, MoeConfig, releases, tensor_shapes
from herd.corpus.document import Document, write_documents
from herd.errors import UsageError
from herd.model import Llama, from_arrays, load, state_arrays
from herd.pretrain.adapting import AdaptConfig, adapt
from herd.pretrain.pruning import check, measure, prune
from herd.train.world import OneRank

SMALL = LlamaConfig(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=40, vocab_size=64, context_length=64,
    norm_eps=1e-9,
)  # fmt: skip
ROWS = [np.random.default_rng(n).integers(0, 64, 30).tolist() for n in range(4)]
Grow = Callable[[dict[str, np.ndarray]], tuple[LlamaConfig, dict[str, np.ndarray]]]


def model(config: LlamaConfig = SMALL, seed: int = 1, scale: float = 4.0) -> Llama:
    made = Llama(config)
    made.init_weights(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            else:
                parameter.mul_(scale)
    return made


def arrays(of: Llama) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in state_arrays(of)}


def logits(of: Llama) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([of(torch.tensor([row]))[0] for row in ROWS])


def places(width: int, kept: list[int]) -> Callable[[np.ndarray, int], np.ndarray]:
    """Spread an axis over `width` places, zeros between."""

    def spread(x: np.ndarray, axis: int) -> np.ndarray:
        shape = list(x.shape)
        shape[axis] = width
        wide = np.zeros(shape, x.dtype)
        index: list[object] = [slice(None)] * x.ndim
        index[axis] = kept
        wide[tuple(index)] = x
        return wide

    return spread


def wider_stream(small: dict[str, np.ndarray]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    spread = places(40, [1, 2, 5, *range(8, 29)])
    grown = {}
    for name, x in small.items():
        if x.ndim == 1:
            # Zeros in the stream lower its mean square, which the norm's weight makes up for.
            grown[name] = spread(x * np.sqrt(24 / 40, dtype=np.float32), 0)
        elif ".wo." in name or ".w2." in name:
            grown[name] = spread(x, 0)
        else:
            grown[name] = spread(x, 1)
    return dataclasses.replace(SMALL, dim=40), grown


def wider_feed_forward(small: dict[str, np.ndarray]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    spread = places(64, [*range(3, 13), *range(20, 50)])
    grown = {n: spread(x, 1 if ".w2." in n else 0) if ".ffn." in n else x for n, x in small.items()}
    return dataclasses.replace(SMALL, ffn_dim=64), grown


def more_heads(small: dict[str, np.ndarray]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """Three key heads with three queries each: of the first the second and third are used, nothing of the second,
    of the third the first and third."""
    query, key = places(72, [*range(8, 24), *range(48, 56), *range(64, 72)]), places(24, [*range(8), *range(16, 24)])
    grown = dict(small)
    for layer in range(2):
        for name, spread, axis in (("wq", query, 0), ("wk", key, 0), ("wv", key, 0), ("wo", query, 1)):
            full = f"layers.{layer}.attention.{name}.weight"
            grown[full] = spread(small[full], axis)
    return dataclasses.replace(SMALL, n_heads=9, n_kv_heads=3), grown


def wider_heads(small: dict[str, np.ndarray]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """Heads of 16 places: RoPE's pairs 0, 2, 4, 6 turn as the four of a head of 8; values are at any places."""
    turned, values = [0, 1, 4, 5, 8, 9, 12, 13], [0, 3, 4, 7, 9, 12, 13, 15]
    grown = dict(small)
    for layer in range(2):
        for name, kept, axis in (("wq", turned, 0), ("wk", turned, 0), ("wv", values, 0), ("wo", values, 1)):
            full = f"layers.{layer}.attention.{name}.weight"
            heads = small[full].shape[axis] // 8
            spread = places(16 * heads, [16 * head + place for head in range(heads) for place in kept])
            grown[full] = spread(small[full], axis) * (np.float32(np.sqrt(2)) if name == "wq" else 1)
    return dataclasses.replace(SMALL, head_dim=16), grown


def more_layers(small: dict[str, np.ndarray]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """Five layers, of which the second and the fourth do something."""
    config = dataclasses.replace(SMALL, n_layers=5)
    grown = {}
    for name, shape in tensor_shapes(config).items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if layer is None:
            grown[name] = small[name]
        elif layer in (1, 3):
            grown[name] = small[name.replace(f"layers.{layer}.", f"layers.{layer // 2}.")]
        else:
            noise = np.random.default_rng(layer).normal(0, 0.1, shape).astype(np.float32)
            grown[name] = noise * (0 if ".wo." in name or ".w2." in name else 1)
    return config, grown


@pytest.mark.parametrize(
    "grow", [wider_stream, wider_feed_forward, more_heads, wider_heads, more_layers], ids=lambda grow: grow.__name__
)
def test_what_does_nothing_is_cut_and_the_rest_computes_what_it_did(grow: Grow) -> None:
    small = model()
    config, grown = grow(arrays(small))
    large = from_arrays(config, grown)
    wanted = logits(small)
    assert torch.allclose(logits(large), wanted, atol=2e-5), "the test's own model is not the same"
    assert wanted.std() > 0.3
    found = prune(large, SMALL, ROWS)
    assert torch.allclose(logits(found), wanted, atol=2e-5)


def test_everything_at_once() -> None:
    small = model()
    _, by_heads = more_heads(arrays(small))
    spread = places(40, [1, 2, 5, *range(8, 29)])
    grown = {
        name: spread(x * np.sqrt(24 / 40, dtype=np.float32), 0) if x.ndim == 1
        else spread(x, 0 if ".wo." in name or ".w2." in name else 1)
        for name, x in by_heads.items()
    }  # fmt: skip
    large = from_arrays(dataclasses.replace(SMALL, n_heads=9, n_kv_heads=3, dim=40), grown)
    assert torch.allclose(logits(prune(large, SMALL, ROWS)), logits(small), atol=2e-5)


def test_what_is_cut_is_what_changes_the_outputs_least() -> None:
    """Feed-forward channels, against leaving out each of them alone and against all other choices of as many."""
    config = dataclasses.replace(SMALL, n_layers=1, ffn_dim=6)
    large = model(config, scale=6.0)
    x = {}
    hook = large.layers[0].ffn.w2.register_forward_pre_hook(lambda _, inputs: x.update(h=inputs[0].detach()))
    full = []
    with torch.no_grad():
        for row in ROWS:
            large.hidden(torch.tensor([row]))
            full.append(x["h"][0])
    hook.remove()
    h_TF, w2_DF = torch.cat(full).double(), large.layers[0].ffn.w2.weight.detach().double()
    harm = [float((h_TF[:, [f]] @ w2_DF[:, [f]].T).square().sum()) for f in range(6)]
    kept = sorted(sorted(range(6), key=lambda f: -harm[f])[:3])
    found = prune(large, dataclasses.replace(config, ffn_dim=3), ROWS)
    assert torch.equal(found.layers[0].ffn.w2.weight, large.layers[0].ffn.w2.weight[:, kept])
    assert torch.equal(found.layers[0].ffn.w1.weight, large.layers[0].ffn.w1.weight[kept])
    losses = {}
    for choice in itertools.combinations(range(6), 3):
        rest = [f for f in range(6) if f not in choice]
        losses[choice] = float((h_TF[:, rest] @ w2_DF[:, rest].T).square().sum())
    assert losses[tuple(kept)] <= sorted(losses.values())[2], "of twenty choices one of the best"


def test_layers_are_measured_by_how_much_they_turn_the_stream() -> None:
    large = model(dataclasses.replace(SMALL, n_layers=4))
    with torch.no_grad():
        for name in ("attention.wo", "ffn.w2"):
            large.get_submodule(f"layers.2.{name}").weight.mul_(0.01)
    x_BSD = [large.embed(torch.tensor([ROWS[0]])).detach()]
    hooks = [block.register_forward_hook(lambda _, __, x: x_BSD.append(x.detach())) for block in large.layers]
    large.hidden(torch.tensor([ROWS[0]]))
    for hook in hooks:
        hook.remove()
    turned = [1 - functional.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(x_BSD)]
    assert measure(large, ROWS[:1]).layers.tolist() == pytest.approx(turned, abs=1e-6)
    found = prune(large, dataclasses.replace(SMALL, n_layers=3), ROWS)
    # Norms are unscaled where no channel is cut.
    assert torch.equal(found.layers[2].attention.wq.weight, large.layers[3].attention.wq.weight)


def test_a_model_that_fits_stays_and_new_tokens_get_the_mean_row() -> None:
    small = model()
    same = prune(small, dataclasses.replace(SMALL, context_length=128, rope_theta=1e6), [])
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), small.parameters(), strict=True))
    wider = prune(small, dataclasses.replace(SMALL, vocab_size=70), [])
    for name in ("embed", "output"):
        before, after = small.get_submodule(name).weight, wider.get_submodule(name).weight
        assert torch.equal(after[:64], before) and after.shape == (70, 24)
        assert torch.allclose(after[64:], before.mean(0).expand(6, -1))
    assert torch.allclose(logits(wider)[..., :64], logits(small))
    tied = prune(small, dataclasses.replace(SMALL, tied_embeddings=True), [])
    assert torch.equal(tied.output_weight, small.embed.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 32}, "dim 24, not 32"),
        ({"n_layers": 3, "ffn_dim": 41}, "n_layers 2, not 3; ffn_dim 40, not 41"),
        ({"n_heads": 3, "n_kv_heads": 1}, "2 queries of a key head, not 3"),
        ({"head_dim": 6}, "heads of 8 places, of which 6 are no whole part"),
        ({"vocab_size": 63}, "a vocabulary of 64, which is not cut"),
        ({"generation": "llama4", "moe": MoeConfig(4, 32)}, "mixtures of experts"),
    ],
)
def test_what_cannot_be_cut_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prune(model(), dataclasses.replace(SMALL, **change), ROWS)  # type: ignore[arg-type]


def test_text_is_needed_where_something_is_cut() -> None:
    with pytest.raises(UsageError, match="at least one calibration row"):
        prune(model(), dataclasses.replace(SMALL, ffn_dim=8), [])


def test_the_published_small_models_can_be_cut_out_of_the_8b() -> None:
    for name in ("llama3.2-1b", "llama3.2-3b"):
        check(releases["llama3.1-8b"].config, releases[name].config)
    with pytest.raises(UsageError, match="dim 2048, not 3072"):
        check(releases["llama3.2-1b"].config, releases["llama3.2-3b"].config)


def test_a_checkpoint_is_adapted_once_and_to_the_text_it_is_shown(tmp_path: Path) -> None:
    texts = [f"def f{n}(a):\n    return a + {n}\n" * (1 + n % 3) for n in range(40)]
    words = tokenizer.train(texts, 300, n_specials=16)
    write_documents(tmp_path / "train.jsonl", [Document(text, f"t/{n}") for n, text in enumerate(texts)])
    shape = dataclasses.replace(SMALL, vocab_size=300)
    checkpoint.save(tmp_path / "large", shape, state_arrays(model(shape)), tokenizer=words)
    target = dataclasses.replace(shape, ffn_dim=16, n_layers=1)
    settings = AdaptConfig(calibration_rows=8, calibration_tokens=20)

    def made(rows: AdaptConfig = settings) -> float:
        out = adapt(rows, str(tmp_path / "large"), target, tmp_path, words, tmp_path / "out", 0, OneRank())
        assert load(out).config == target
        return (out / "config.json").stat().st_mtime_ns

    first = made()
    assert made() == first, "an earlier call's is kept"
    assert made(AdaptConfig(calibration_rows=9, calibration_tokens=20)) > first
    assert checkpoint.open_checkpoint(tmp_path / "out").tokenizer.vocab_size == 300
    other = tokenizer.train([text.upper() for text in texts], 300, n_specials=16)
    with pytest.raises(UsageError, match="does not begin with that of"):
        adapt(settings, str(tmp_path / "large"), target, tmp_path, other, tmp_path / "other", 0, OneRank())
