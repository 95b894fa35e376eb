"""The plan of an extension against the published card, and `herd extend`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from herd import UsageError
from herd.architecture import law_theta, releases
from herd.cli import main
from herd.pretrain import CARD, plan_extension

LLAMA3 = releases["llama3-8b"].config
# Written out from the card: context, theta in millions, tokens.
PUBLISHED = [
    (65_536, 15.3, 62_914_560),
    (262_144, 207.1, 100_663_296),
    (524_288, 1060.0, 419_430_400),
    (1_048_576, 2800.0, 838_860_800),
    (4_194_304, 45_200.0, 184_549_376),
]


def test_the_card_is_the_published_one() -> None:
    assert [(stage.context, stage.theta / 1e6, stage.tokens) for stage in CARD] == PUBLISHED
    assert all(s.batch * s.accumulation * s.steps * s.context == s.tokens for s in CARD)
    assert sum(stage.tokens for stage in CARD) == 1_606_418_432


def test_the_plan_for_llama3_is_the_card() -> None:
    plan = plan_extension(LLAMA3, 4_194_304, "card")
    assert [(stage.context, stage.rope_theta / 1e6, stage.tokens) for stage in plan] == PUBLISHED
    by_law = plan_extension(LLAMA3, 4_194_304)
    assert [stage.rope_theta for stage in by_law] == pytest.approx(
        [law_theta(5e5, 8192, context) for context, _, _ in PUBLISHED], rel=5e-4
    )
    assert [dataclasses.replace(stage, rope_theta=0) for stage in by_law] == [
        dataclasses.replace(stage, rope_theta=0) for stage in plan
    ]


@pytest.mark.parametrize(
    ("trained", "to", "contexts"),
    [
        (512, 4096, [4096]),
        (512, 2048, [2048]),
        (512, 5000, [4096, 5000]),
        (2048, 262_144, [16_384, 65_536, 131_072, 262_144]),
        (8192, 131_072, [65_536, 131_072]),
    ],
)
def test_contexts_of_other_models_keep_the_ratios(trained: int, to: int, contexts: list[int]) -> None:
    plan = plan_extension(dataclasses.replace(LLAMA3, context_length=trained), to)
    assert [stage.context for stage in plan] == contexts
    assert all(stage.tokens == stage.batch * stage.accumulation * stage.steps * stage.context for stage in plan)
    assert [stage.card for stage in plan] == [stage.name for stage in CARD[: len(plan)]]


@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_other_methods_scale_from_the_trained_context(method: Any) -> None:
    plan = plan_extension(LLAMA3, 262_144, method)
    scalings = [stage.rope_scaling for stage in plan]
    assert [(s.kind, s.factor) for s in scalings if s] == [(method, 8), (method, 32)]
    assert {stage.rope_theta for stage in plan} == {5e5}


@pytest.mark.parametrize(
    ("changes", "to", "method", "said"),
    [
        ({}, 8192 * 512 + 1, "law", "up to 4194304"),
        ({}, 4096, "law", "more than 8192"),
        ({}, 65_536, "guess", "card, law, ntk"),
        ({}, 131_072, "card", "65536, 262144"),
        ({"rope_theta": 1e6}, 65_536, "card", "theta 500000"),
        ({"context_length": 512}, 4096, "card", "context 8192"),
    ],
)
def test_what_has_no_plan(changes: dict[str, Any], to: int, method: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_extension(dataclasses.replace(LLAMA3, **changes), to, method)


def _herd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_command(make_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path: Path = make_model(context_length=256)
    assert _herd("extend", str(path), "--to", "2048", "--plan", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [stage["context"] for stage in data["stages"]] == [2048]
    assert data["stages"][0]["rope_theta"] == pytest.approx(law_theta(1e4, 256, 2048), rel=5e-4)
    assert data["tokens"] == 32 * 30 * 2048
    assert _herd("extend", "llama3-8b", "--to", "262144", "--plan", "--method", "card") == 0
    shown = capsys.readouterr().out
    assert "1.53e+07" in shown and "2.071e+08" in shown and "163,577,856 tokens in all" in shown
    assert _herd("extend", "llama3-8b", "--to", "262144") == 2
    assert "--plan" in capsys.readouterr().err
    assert _herd("extend", "llama3.1-8b", "--to", "262144", "--plan") == 2
    assert "scaled already" in (said := capsys.readouterr().err) and "--method llama3" in said
    assert _herd("extend", "llama3.1-8b", "--to", "1048576", "--plan", "--method", "llama3") == 0
    assert "llama3 x64" in capsys.readouterr().out
