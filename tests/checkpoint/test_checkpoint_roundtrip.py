"""Every generation through every format and back: not one bit changes, and the config comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from herd import HerdError, UsageError
from herd.architecture import LlamaConfig, weight_bytes
from herd.checkpoint import convert, open_checkpoint, save

ROWS = [
    "llama1", "llama2", "codellama", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4-scout", "llama4-maverick", "llama4-odd", "llama4-dense",
]  # fmt: skip
Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
Same = Callable[[np.ndarray, np.ndarray], bool]


@pytest.mark.parametrize("row", ROWS)
def test_hf_meta_gguf_and_back_keep_every_bit(row: str, tmp_path: Path, small: Small, same_bits: Same) -> None:
    config, weights = small(row)
    source = save(tmp_path / "start", config, weights, max_shard_bytes=20_000)
    for step, to in enumerate(["meta", "gguf", "hf", "gguf", "meta", "hf"]):
        target = tmp_path / (f"{step}.gguf" if to == "gguf" else f"{step}-{to}")
        convert(source, target, to=to, shards=2 if to == "meta" else 1, max_shard_bytes=50_000)
        with open_checkpoint(target) as checkpoint:
            assert checkpoint.format == to
            assert checkpoint.config == config
            assert list(checkpoint) == list(weights)
            for name, array in checkpoint.items():
                # GGUF keeps vectors and routers in float32, which holds bfloat16 exactly.
                expected = weights[name].astype(array.dtype) if to == "gguf" else weights[name]
                assert same_bits(array, expected), (to, name)
        source = target


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_other_number_formats_keep_every_bit_too(dtype: str, tmp_path: Path, small: Small, same_bits: Same) -> None:
    config, weights = small("llama3.2", dtype)
    source = save(tmp_path / "start", config, weights, format="meta")
    for to in ("gguf", "hf"):
        source = convert(source, tmp_path / (to + (".gguf" if to == "gguf" else "")), to=to)
    with open_checkpoint(source) as checkpoint:
        assert all(same_bits(checkpoint[name], weights[name]) for name in weights)


def test_float32_norms_stay_float32_when_bfloat16_would_lose_bits(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    weights["norm.weight"] = np.full(64, 1.0001, np.float32)
    save(tmp_path / "m.gguf", config, weights, format="gguf")
    with open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "hf", to="hf")) as checkpoint:
        assert checkpoint.type_name("norm.weight") == "f32"
        assert checkpoint.type_name("layers.0.ffn_norm.weight") == "bf16"
        assert (checkpoint["norm.weight"] == np.float32(1.0001)).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("row", ["llama2", "llama3.1", "llama4-maverick"])
def test_any_number_of_meta_shards_gives_the_same_model(
    row: str, shards: int, tmp_path: Path, small: Small, same_bits: Same
) -> None:
    """Four shards are more than the two key/value heads: each head is then in two of them."""
    config, weights = small(row)
    save(tmp_path / "meta", config, weights, format="meta", shards=shards)
    assert len(list((tmp_path / "meta").glob("*.pth"))) == shards
    with open_checkpoint(tmp_path / "meta") as checkpoint:
        assert checkpoint.config == config
        assert all(same_bits(checkpoint[name], weights[name]) for name in weights)


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_pairs_may_come_in_any_order(to: str, tmp_path: Path, small: Small, same_bits: Same) -> None:
    config, weights = small("llama4-maverick")
    names = sorted(weights, key=lambda name: name[::-1])  # not the order of the forward pass
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    save(target, config, ((name, weights[name]) for name in names), format=to, max_shard_bytes=30_000)
    with open_checkpoint(target) as checkpoint:
        for name in weights:
            assert same_bits(checkpoint[name], weights[name].astype(checkpoint[name].dtype))


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_equal_weights_give_equal_files(to: str, tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3.2")
    for name in ("a", "b"):
        save(tmp_path / name, config, weights, format=to)
    if to == "gguf":
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    else:
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_quantised_files_hold_the_conventional_types(dtype: str, tmp_path: Path, small: Small) -> None:
    config, weights = small("llama4-scout", "f32")
    save(tmp_path / "m.gguf", config, weights, format="gguf", dtype=dtype)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        types = {name: checkpoint.type_name(name) for name in checkpoint}
        assert types["embed.weight"] == types["output.weight"] == "q8_0"
        assert types["layers.0.moe.router.weight"] == types["layers.1.ffn_norm.weight"] == "f32"
        assert types["layers.2.attention.wq.weight"] == dtype
        # Rows of 48 are no whole blocks: the experts' second matrix stays in float16.
        assert types["layers.0.moe.experts.w2"] == "f16"
        assert types["layers.0.moe.experts.w1"] == dtype
        for name, array in checkpoint.items():
            assert array.shape == weights[name].shape
            step = np.abs(weights[name]).max() / (127 if types[name] == "q8_0" else 8)
            # The least squared error may cut the largest weight by some of a step more than half of one.
            assert np.abs(array.astype(np.float32) - weights[name]).max() <= 1.2 * step
        raw = checkpoint.raw("layers.2.attention.wq.weight")
        assert raw.type_name == dtype and raw.shape == (64, 64)
        assert raw.data.nbytes == 64 * 64 // 32 * (34 if dtype == "q8_0" else 18)


@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("row", ["llama3", "llama3.2", "llama4-odd"])
def test_the_size_that_herd_list_prints_is_the_size_of_the_weights(
    tmp_path: Path, small: Small, row: str, dtype: str
) -> None:
    config, weights = small(row)
    path = save(tmp_path / "m.gguf", config, weights, format="gguf", dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        assert sum(checkpoint.raw(name).data.nbytes for name in checkpoint) == weight_bytes(config, dtype)


def test_quantising_twice_changes_nothing(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3", "f32")
    first = save(tmp_path / "1.gguf", config, weights, format="gguf", dtype="q8_0")
    second = convert(first, tmp_path / "2.gguf", to="gguf", dtype="q8_0")
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        assert all(a.raw(name).data.tobytes() == b.raw(name).data.tobytes() for name in a)


def test_raw_bytes_of_a_half_split_tensor_are_canonical(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    save(tmp_path / "hf", config, weights)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        raw = checkpoint.raw("layers.0.attention.wq.weight")
        assert raw.data.tobytes() == weights["layers.0.attention.wq.weight"].tobytes()
        assert raw.type_name == "bf16"


def test_reading_gives_arrays_that_belong_to_the_caller(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    save(tmp_path / "hf", config, weights)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        first = checkpoint["norm.weight"]
        first[:] = 0
        assert checkpoint["norm.weight"].any()
    assert not first.any()  # and outlive the file


def test_wrong_tensors_are_refused_and_leave_nothing_behind(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    wrong = dict(weights)
    del wrong["norm.weight"]
    cases = {
        "missing": wrong,
        "no part of the model": weights | {"extra": weights["norm.weight"]},
        "wrong shape": weights | {"norm.weight": weights["norm.weight"][:-1]},
        "cannot be stored": weights | {"norm.weight": np.zeros(64, np.int32)},
    }
    for to in ("hf", "meta", "gguf"):
        for message, tensors in cases.items():
            for form in (tensors, list(tensors.items())):
                with pytest.raises(HerdError, match=message):
                    save(tmp_path / "m", config, form, format=to)
    with pytest.raises(HerdError, match="came twice"):
        save(tmp_path / "m", config, [*weights.items(), ("norm.weight", weights["norm.weight"])])
    with pytest.raises(HerdError, match="no tensors"):
        save(tmp_path / "m", config, [])
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_no_checkpoint_is_left_alone(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("ten years of work")
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(UsageError):
            save(home, config, weights, format=to)
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(UsageError):
            save(home / "thesis.txt", config, weights, format=to)
    assert (home / "thesis.txt").read_text() == "ten years of work"
    save(tmp_path / "m", config, weights)
    save(tmp_path / "m", config, weights, dtype="f32")  # a checkpoint is replaced
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.type_name("norm.weight") == "f32"
    with pytest.raises(UsageError, match="onto itself"):
        convert(tmp_path / "m", tmp_path / "m", to="hf")
    inside = convert(tmp_path / "m", tmp_path / "m" / "x.gguf", to="gguf")
    with pytest.raises(UsageError, match="onto itself"):  # replacing the directory would delete the source
        convert(inside, tmp_path / "m", to="hf")
    convert(tmp_path / "m", inside, to="gguf", dtype="q8_0")  # a GGUF file is replaced
    with open_checkpoint(inside) as checkpoint:
        assert checkpoint.type_name("embed.weight") == "q8_0"


def test_what_a_format_cannot_express_is_said(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    with pytest.raises(UsageError, match="unknown checkpoint format"):
        save(tmp_path / "m", config, weights, format="onnx")
    with pytest.raises(UsageError, match="cannot store"):
        save(tmp_path / "m", config, weights, dtype="q4_0")
    with pytest.raises(UsageError, match="equal shards"):
        save(tmp_path / "m", config, weights, format="meta", shards=5)


def test_weights_too_large_for_float16_are_refused(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    weights["output.weight"][3, 4] = 1e30
    with pytest.raises(HerdError, match="too large for float16"):
        save(tmp_path / "m", config, weights, dtype="f16")


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path, small: Small) -> None:
    """Converting a model needs a small multiple of its largest tensor, not of the model."""
    import tracemalloc
    from dataclasses import replace

    config = replace(small("llama3")[0], dim=256, n_layers=24, ffn_dim=512, head_dim=64)
    from herd.architecture import parameter_count, tensor_shapes

    pairs = ((name, np.full(shape, 0.5, np.float32)) for name, shape in tensor_shapes(config).items())
    largest = max(int(np.prod(shape)) for shape in tensor_shapes(config).values()) * 4
    tracemalloc.start()
    source = save(tmp_path / "0", config, pairs)
    for to, name in (("meta", "1"), ("gguf", "2.gguf"), ("hf", "3")):
        source = convert(source, tmp_path / name, to=to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parameter_count(config) * 4 > 20 * largest
    assert peak < 4 * largest + 8_000_000
