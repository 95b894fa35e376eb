"""Phases, mixes and annealing as numbers: against a walk through the steps, and against the published ramp."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.config import parse_config
from herd.errors import UsageError
from herd.pretrain import PretrainConfig
from herd.pretrain.config import Size
from herd.pretrain.phases import Phases
from herd.pretrain.rows import stretches
from herd.train import TrainConfig, lr_factor

SIZES = st.tuples(st.integers(1, 300), st.sampled_from([4, 8, 16]), st.integers(1, 6))


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, max_size=4, unique_by=lambda size: size[0]), st.integers(1, 400))
def test_what_a_step_has_is_what_a_walk_finds(sizes: list[tuple[int, int, int]], tokens: int) -> None:
    later = [Size(from_tokens=a, seq_len=b, batch_size=c) for a, b, c in sorted(sizes)]
    phases = Phases(8, 2, later)
    step = row = token = 0
    rows = []
    while step < 80:
        begun = [size for size in later if size.from_tokens <= token]
        seq_len, batch_size = (begun[-1].seq_len, begun[-1].batch_size) if begun else (8, 2)
        phase = phases[phases.number(step)]
        assert (phase.seq_len, phase.batch_size) == (seq_len, batch_size)
        assert phases.rows_before(step) == row and phases.tokens_before(step) == token
        rows += [token + seq_len * i for i in range(batch_size)]
        step, row, token = step + 1, row + batch_size, token + batch_size * seq_len
    if tokens <= rows[-1]:
        assert phases.row_at(tokens) == next(row for row, before in enumerate(rows) if before >= tokens)


def test_the_ramp_of_llama_3_1_405b() -> None:
    """4M tokens a step in rows of 4,096, from 252M tokens on 8M in rows of 8,192, from 2.87T on 16M."""
    later = [
        Size(from_tokens=252_000_000, seq_len=8192, batch_size=1024),
        Size(from_tokens=2_870_000_000_000, seq_len=8192, batch_size=2048),
    ]
    phases = Phases(4096, 1024, later)
    assert [phase.step_tokens for phase in phases] == [2**22, 2**23, 2**24]
    assert phases[1].first_token == 61 * 2**22 and 252e6 <= phases[1].first_token < 252e6 + 2**22
    assert 0 <= phases[2].first_token - 2.87e12 < 2**23
    # Row numbers of the whole run, in 15.6T tokens: two thousand million rows without a table.
    steps = next(s for s in range(1_000_000, 1_200_000) if phases.tokens_before(s) >= 15.6e12)
    assert phases.rows_before(steps) == pytest.approx(15.6e12 / 8192, rel=1e-4)
    # By hand: 61 steps, then 2.87T - 61 · 2^22 tokens by 2^23, then the rest by 2^24.
    second = -(-(2_870_000_000_000 - 61 * 2**22) // 2**23)
    assert steps == 61 + second + -(-(15_600_000_000_000 - 61 * 2**22 - second * 2**23) // 2**24) == 1_100_929


def _config(**fields: Any) -> PretrainConfig:
    train = {"steps": 100, "seq_len": 8, "batch_size": 4} | fields.pop("train", {})
    return parse_config(PretrainConfig, {"train": train} | fields, "here")


SOURCES = {"a": {"weight": 3}, "b": {"weight": 1, "kind": "prose"}}


def test_stretches_are_where_anything_changes() -> None:
    config = _config(
        sources=SOURCES,
        phases=[{"from_tokens": 321, "seq_len": 16, "batch_size": 8}],  # 11 steps of 32 tokens, 44 rows
        mix=[{"from_tokens": 100, "weights": {"b": 1}}, {"from_tokens": 10_000, "weights": {"a": 1, "b": 1}}],
        anneal={"weights": {"a": 0.2, "b": 0.8}},
        train={"anneal": 10},
    )
    found = [(s.first, s.seq_len, dict(s.weights)) for s in stretches(config)]
    after = 44 + -(-(10_000 - 44 * 8) // 16)
    assert found == [
        (0, 8, {"a": 3, "b": 1}),
        (13, 8, {"b": 1}),
        (44, 16, {"b": 1}),
        (after, 16, {"a": 1, "b": 1}),
        (44 + (90 - 11) * 8, 16, {"a": 0.2, "b": 0.8}),
    ]
    assert [(s.first, dict(s.weights)) for s in stretches(_config())] == [(0, {"train": 1})]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"phases": [{"from_tokens": 50, "seq_len": 8, "batch_size": 8}] * 2},
            "phases must begin after one another, but phases.0 begins at 50 tokens and phases.1 at 50",
        ),
        ({"phases": [{"from_tokens": 9, "seq_len": 12, "batch_size": 8}]}, "seq_len 8 does not divide the longest row"),
        ({"phases": [{"from_tokens": 0, "seq_len": 8, "batch_size": 8}]}, "greater than or equal to 1"),
        ({"phases": [{"from_tokens": 1, "seq_len": 8}]}, "'phases.0.batch_size' is not given"),
        ({"mix": [{"from_tokens": 9, "weights": {"a": 1}}]}, "weights need sources"),
        (
            {"sources": SOURCES, "mix": [{"from_tokens": 9, "weights": {"c": 1}}]},
            "mix.0.weights names 'c', which is no source; sources are a, b",
        ),
        ({"sources": SOURCES, "mix": [{"from_tokens": 9, "weights": {"a": 0}}]}, "mix.0.weights: at least one weight"),
        ({"sources": {"a": {"weight": 0}}}, "sources: at least one weight"),
        ({"sources": {"a/b": {"weight": 1}}}, "letters, digits"),
        ({"sources": {"a": {"weight": 1, "shards": ["x"], "kind": "code"}}}, "shards are tokens already"),
        ({"sources": SOURCES, "infilling": 0.5}, "sources.NAME.infilling"),
        ({"sources": SOURCES, "anneal": {"weights": {"a": 1}}}, "there are none"),
        ({"train": {"anneal": 101}}, "anneal 101 is more than all steps, 100"),
        ({"train": {"anneal": 5}, "max_minutes": 5}, "max_minutes cannot decide"),
        ({"phases": [{"from_tokens": 9, "seq_len": 8, "batch_size": 8}], "max_minutes": 1}, "planned by max_minutes"),
        ({"train": {"anneal": 5, "average": "ema"}}, "two averages"),
        (
            {
                "sources": SOURCES,
                "train": {"anneal": 50},
                "anneal": {"weights": {"a": 1}},
                "mix": [{"from_tokens": 1601, "weights": {"a": 1}}],
            },
            "mix changes at 1601 tokens, when anneal.weights hold already",
        ),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        _config(**fields)
    assert said in str(refused.value) and str(refused.value).startswith("here: ")


def test_annealing_falls_linearly_to_zero_from_where_the_schedule_ended() -> None:
    for schedule in ("cosine", "constant", "wsd", "linear"):
        config = TrainConfig(steps=120, anneal=20, warmup=10, schedule=schedule, final_lr_ratio=0.1)
        plain = config.model_copy(update={"steps": 100, "anneal": 0})
        rates = [lr_factor(step, 120, config) for step in range(120)]
        assert rates[:100] == [lr_factor(step, 100, plain) for step in range(100)]
        assert rates[99] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert rates[100:] == pytest.approx([rates[99] * (19 - i) / 20 for i in range(20)])
        assert rates[-1] == 0
    alone = TrainConfig(steps=10, anneal=10)
    assert [lr_factor(step, 10, alone) for step in range(10)] == pytest.approx([(9 - i) / 10 for i in range(10)])


def test_every_field_has_a_description() -> None:
    from herd.pretrain import config

    for kind in (config.Source, config.Mix, config.Size, config.Annealing, PretrainConfig):
        assert all(field.description for field in kind.model_fields.values())
