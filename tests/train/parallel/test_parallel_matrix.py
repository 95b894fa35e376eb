"""Every axis and every pair of axes gives the losses and gradients of one process; docs/parallel.md has the figures.

HERD_WRITE_MATRIX=1 writes the rows of the cases that run into the table (all of them with --all).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.train.parallel.cases import CASES, Case, run
from tests.train.parallel.launch import launch

DOCS = Path(__file__).parents[3] / "docs" / "parallel.md"
LOSS, GRADIENT = 1e-6, 1e-5
"""Largest differences that are allowed: of the loss, relative; of a gradient, by its norm."""
RANKS = (2, 4, 8)


def compute(rank: int, out: Path, numbers: list[int]) -> None:
    """One rank of the cases with these numbers."""
    for number in numbers:
        torch.save(run(CASES[number], out / f"run-{number}"), out / f"{number}-{rank}.pt")


@pytest.fixture(scope="module")
def differences(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, float]]:
    """Worst (loss, gradient) differences from one process by number of the case: all cases of this session."""
    runs = [
        item
        for item in request.session.items
        if isinstance(item, pytest.Function) and not item.get_closest_marker("skip")
    ]
    wanted = {item.callspec.params["number"] for item in runs if item.function is test_many_ranks_equal_one}
    found = {}
    for ranks in RANKS:
        numbers = [number for number in sorted(wanted) if CASES[number].ranks == ranks]
        if not numbers:
            continue
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        launch(ranks, "tests.train.parallel.test_parallel_matrix:compute", out, timeout=2400, numbers=numbers)
        for number in numbers:
            found[number] = _difference(CASES[number], number, out)
    if os.environ.get("HERD_WRITE_MATRIX"):
        _publish(found)
    return found


@cache
def _alone(model: str, out: Path) -> list[tuple[float, float, int, dict[str, torch.Tensor]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(Case(model, 1, {}), out)
    finally:
        torch.set_num_threads(threads)


def _difference(case: Case, number: int, out: Path) -> tuple[float, float]:
    loss = gradient = 0.0
    seen = set()
    expected = _alone(case.model, out / "alone")
    for rank in range(case.ranks):
        steps = torch.load(out / f"{number}-{rank}.pt")
        for (l1, n1, t1, g1), (l0, n0, t0, g0) in zip(steps, expected, strict=True):
            assert t1 == t0
            loss = max(loss, abs(l1 - l0) / l0)
            gradient = max(gradient, abs(n1 - n0) / n0)
            for name, found in g1.items():
                whole = g0[name if name in g0 else "embed.weight"]  # a pipeline's copy of a tied embedding
                seen.add(name)
                gradient = max(gradient, ((found - whole).norm() / whole.norm()).item())
    assert set(expected[0][3]) <= seen, "some rank has every gradient"
    return loss, gradient


@pytest.mark.timeout(3600)  # the first one computes all
@pytest.mark.parametrize(
    "number", [pytest.param(i, id=c.name, marks=[pytest.mark.slow] * c.slow) for i, c in enumerate(CASES)]
)
def test_many_ranks_equal_one(number: int, differences: dict[int, tuple[float, float]]) -> None:
    loss, gradient = differences[number]
    assert loss < LOSS and gradient < GRADIENT, (loss, gradient)


def test_the_published_table_has_every_case() -> None:
    rows = [line[2:-2].split(" | ") for line in _table(DOCS.read_text())[1].splitlines()[2:]]
    assert [row[:2] for row in rows] == [[case.name, str(case.ranks)] for case in CASES]
    assert all(float(loss) < LOSS and float(gradient) < GRADIENT for _, _, loss, gradient in rows)


def _table(text: str) -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    begin, end = "<!-- matrix -->\n", "<!-- end of matrix -->"
    head, rest = text.split(begin)
    table, tail = rest.split(end)
    return head + begin, table, end + tail


def _publish(found: dict[int, tuple[float, float]]) -> None:
    """Write what was found into the table; rows of cases that did not run stay as they are."""
    head, table, tail = _table(DOCS.read_text())
    rows = {line.split(" | ")[0]: line for line in table.splitlines()[2:]}
    for number, (loss, gradient) in found.items():
        name = CASES[number].name
        rows[f"| {name}"] = f"| {name} | {CASES[number].ranks} | {loss:.1e} | {gradient:.1e} |"
    lines = [rows[f"| {case.name}"] for case in CASES if f"| {case.name}" in rows]
    DOCS.write_text(head + "\n".join(["| model: axes | ranks | loss | gradients |", "|---|---|---|---|", *lines, tail]))
