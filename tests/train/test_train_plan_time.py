"""Communication and time of a step, counted by hand for small cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from herd.architecture import releases
from herd.train.plan import GPUS, Job, Layout, Settings, StepTime
from herd.train.plan.layout import Trainer
from herd.train.plan.step_time import exposed, step_time

H100 = GPUS["h100"]
_8B = releases["llama3.1-8b"].config
SCOUT = releases["llama4-scout-17b-16e"].config
D, LAYERS, SEQ = _8B.dim, _8B.n_layers, 8192


def step(
    layout: Layout,
    settings: Settings,
    sequences: int,
    seq: int = SEQ,
    config: object = _8B,
    trainer: Trainer = "published",
) -> StepTime:
    assert isinstance(config, type(_8B))
    return step_time(Job(config, seq, seq * sequences, trainer=trainer), layout, settings, H100)


def test_parts_make_the_step() -> None:
    found = step(Layout(2, 2, 2, 2), Settings(1, "interleaved", 2), 16)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(found.parts[axis] > 0 and found.volume[axis] > 0 for axis in ("tp", "cp", "pp", "dp"))
    assert found.volume["ep"] == found.parts["ep"] == 0
    alone = step(Layout(1, 1, 1, 1), Settings(), 4)
    assert not any(alone.volume.values()) and alone.bubble == 0


def test_tensor_ranks_gather_and_scatter_before_and_after_both_halves() -> None:
    """arXiv 2205.05198: four collectives of S·D values forward and four backward; four more to compute again."""
    bf16 = 2 * SEQ * D * 3 / 4
    for recompute, times in (("none", 8), ("full", 12)):
        found = step(Layout(4, 1, 1, 1), Settings(1, recompute=recompute), 6)  # type: ignore[arg-type]
        assert found.volume["tp"] == pytest.approx(6 * LAYERS * times * bf16)
    rate = 0.8 * 450e9
    assert found.parts["tp"] == pytest.approx(found.volume["tp"] / rate + 6 * LAYERS * 12 * 20e-6)


def test_context_ranks_gather_keys_and_values() -> None:
    kv = 2 * _8B.n_kv_heads * _8B.head_dim * 2 * SEQ * 3 / 4
    found = step(Layout(1, 4, 1, 1), Settings(), 2)
    assert found.volume["cp"] == pytest.approx(2 * LAYERS * 3 * kv)  # forward, again backward, and their gradients
    tensor = step(Layout(16, 4, 1, 1), Settings(), 2)
    assert tensor.volume["cp"] == pytest.approx(2 * LAYERS * 3 * kv / 8)  # 8 heads: one on each of 16 ranks, twice


def test_chunked_attention_needs_a_neighbour_only() -> None:
    seq = 131_072
    chunked = step(Layout(1, 8, 1, 1), Settings(), 1, seq, SCOUT)
    whole = step(Layout(1, 8, 1, 1), Settings(), 1, seq, replace(SCOUT, attention_chunk=None))
    token = 3 * 2 * SCOUT.n_kv_heads * SCOUT.head_dim * 2
    assert whole.volume["cp"] == pytest.approx(48 * token * seq * 7 / 8)
    assert chunked.volume["cp"] == pytest.approx(token * (12 * seq * 7 / 8 + 36 * 2 * 8192))
    assert chunked.parts["compute"] < whole.parts["compute"]


def test_experts_send_every_token_there_and_back() -> None:
    found = step(Layout(1, 1, 1, 4, 4), Settings(), 8, config=SCOUT)
    each_way = 2 * SEQ * SCOUT.dim * 3 / 4
    assert found.volume["ep"] == pytest.approx(2 * 48 * 4 * each_way)  # two micro-batches, forward and backward
    full = step(Layout(1, 1, 1, 4, 4), Settings(recompute="full"), 8, config=SCOUT)
    assert full.volume["ep"] == pytest.approx(found.volume["ep"] * 3 / 2)


def test_data_ranks_gather_weights_and_reduce_gradients() -> None:
    n, count = releases["llama3.1-8b"].parameters, 4
    for sharding, n_bytes in (
        ("optimizer", 2 * n + 4 * n),
        ("gradients", 2 * n + count * 4 * n),
        ("parameters", count * (2 * 2 * n + 4 * n)),
    ):
        found = step(Layout(1, 1, 1, 16), Settings(sharding=sharding), 16 * count)  # type: ignore[arg-type]
        assert found.volume["dp"] == pytest.approx(n_bytes * 15 / 16)
    pp, virtual = 2, 2
    in_a_row = step(Layout(1, 1, pp, 16), Settings(1, "looped-bfs", virtual, "none", "gradients"), 16 * count)
    once = step(Layout(1, 1, pp, 16), Settings(1, "interleaved", virtual, "none", "optimizer"), 16 * count)
    assert in_a_row.volume["dp"] == once.volume["dp"]  # all backward passes of a chunk in a row: one reduction


def test_pipeline_ranks_hand_on_activations_and_gradients() -> None:
    found = step(Layout(2, 2, 4, 1), Settings(1, "interleaved", 2), 8)
    assert found.volume["pp"] == pytest.approx(8 * 2 * 2 * (SEQ / 2) * 2 * D / 2)
    assert found.bubble == pytest.approx(3 / (2 * 8))
    assert step(Layout(2, 2, 4, 1), Settings(), 8).bubble == pytest.approx(3 / 8)


def test_what_computes_again_takes_longer() -> None:
    times = [step(Layout(1, 1, 1, 1), Settings(recompute=one), 1) for one in ("none", "selective", "full")]  # type: ignore[arg-type]
    seconds = [one.parts["compute"] for one in times]
    assert seconds[0] < seconds[1] < seconds[2] < seconds[0] * 4 / 3
    assert len({one.flops for one in times}) == 1


def test_our_own_trainer_sends_states_in_fp32() -> None:
    """Gathered states and their gradients take twice as much, and so do what stages hand on and the gradients of keys
    and values; results and their gradients do not."""
    cases = [
        ("tp", Layout(4, 1, 1, 1), _8B, 3 / 2),
        ("cp", Layout(1, 4, 1, 1), _8B, 4 / 3),
        ("pp", Layout(1, 1, 4, 1), _8B, 2),
        ("ep", Layout(1, 1, 1, 4, 4), SCOUT, 3 / 2),
    ]
    for axis, layout, config, times in cases:
        published, own = (step(layout, Settings(), 8, SEQ, config, one) for one in ("published", "herd"))
        assert own.volume[axis] == pytest.approx(times * published.volume[axis]), axis
        assert own.seconds > published.seconds


def test_our_own_trainer_gathers_weights_for_every_micro_batch() -> None:
    n, count = releases["llama3.1-8b"].parameters, 4
    ends = 2 * _8B.vocab_size * D + D
    for sharding, gathers, reduces in (
        ("optimizer", count, 1),
        ("gradients", count, count),
        ("parameters", 2 * count, count),
    ):
        found = step(Layout(1, 1, 1, 16), Settings(sharding=sharding), 16 * count, SEQ, _8B, "herd")  # type: ignore[arg-type]
        expected = gathers * (2 * n + 2 * ends) + reduces * 4 * n
        assert found.volume["dp"] == pytest.approx(expected * 15 / 16)
    stage = step(Layout(1, 1, 4, 4), Settings(), 4 * count, SEQ, _8B, "herd")
    assert stage.volume["dp"] < (2 * n + 2 * ends + 4 * n) * 3 / 4  # once a step, and a quarter of the model


def test_links() -> None:
    assert [Layout(4, 2, 2, 2).in_node(axis) for axis in ("tp", "cp", "pp", "dp")] == [4, 2, 1, 1]
    assert Layout(16, 1, 1, 4).in_node("tp") == 8
    assert Layout(1, 2, 1, 64).in_node("cp", "dp") == 8
    assert H100.link(8, 8).rate == pytest.approx(0.8 * 450e9)
    assert H100.link(16, 1).rate == pytest.approx(0.8 * 50e9)
    assert H100.link(64, 4).rate == pytest.approx(0.8 * 200e9)  # four network ports together
    assert H100.link(2, 1).seconds(40e9, 2) == pytest.approx(1 + 2 * 50e-6)


def test_half_of_what_could_be_hidden_is() -> None:
    assert exposed(2.0, 10.0) == 1.0
    assert exposed(2.0, 1.0) == 1.5
    assert exposed(2.0, 0.0) == 2.0


def test_float8_makes_products_faster_and_nothing_else() -> None:
    layout, settings = Layout(8, 1, 1, 1), Settings()
    bf16 = step_time(Job(_8B, SEQ, SEQ, trainer="published"), layout, settings, H100)
    fp8 = step_time(Job(_8B, SEQ, SEQ, "fp8", trainer="published"), layout, settings, H100)
    assert fp8.parts["compute"] < bf16.parts["compute"] < H100.float8 * fp8.parts["compute"]
    assert fp8.parts["tp"] == bf16.parts["tp"]
