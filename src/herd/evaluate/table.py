"""An evaluation's results as text tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEVELS = ("easy", "medium", "hard")


def results_table(results: Mapping[str, Any]) -> str:
    """Lines for a terminal, from the data of results.json (any part of it may be missing or empty)."""
    parts = [
        _bits(results.get("bits_per_byte") or {}, results.get("compressors") or {}),
        _match(results.get("exact_match") or {}),
        _comparison(results.get("comparison")),
        _kinds(results.get("exact_match") or {}),
    ]
    return "\n\n".join(part for part in parts if part)


def _bits(models: Mapping[str, Any], compressors: Mapping[str, Any]) -> str:
    if not models and not compressors:
        return ""
    some = next(iter([*models.values(), *compressors.values()]))
    size = some.get("bytes") or some["original"]
    rows = [(name, f"{data['bits_per_byte']:.3f}", f"{data['nats_per_token']:.3f}") for name, data in models.items()]
    rows += [(name, f"{data['bits_per_byte']:.3f}", "") for name, data in compressors.items()]
    return f"Held-out text, {size:,} bytes\n" + _columns(("", "bits per byte", "nats per token"), rows)


def _match(models: Mapping[str, Any]) -> str:
    if not models:
        return ""
    levels = list(dict.fromkeys(level for data in models.values() for level in data["by_difficulty"]))
    rows = [
        (name, *(score_text(data["by_difficulty"].get(level)) for level in levels), score_text(data["overall"]))
        for name, data in models.items()
    ]
    n = next(iter(models.values()))["overall"]["n"]
    return f"Exact match on {n:,} held-out exercises, % ± 95 % interval\n" + _columns(("", *levels, "all"), rows)


def _comparison(data: Mapping[str, Any] | None) -> str:
    if not data:
        return ""
    return (
        f"{data['before']} → {data['after']}: {100 * data['difference']:+.1f} ± {100 * data['ci95']:.1f} points; "
        f"{data['gained']} gained, {data['lost']} lost of {data['n']} (McNemar p = {data['p_value']:.2g})"
    )


def _kinds(models: Mapping[str, Any]) -> str:
    """One row a kind: the scores of all models."""
    if not models:
        return ""
    last = list(models.values())[-1]["by_kind"]
    rows = []
    for kind in kinds_in_order(last):
        scores = [score_text(data["by_kind"].get(kind)) for data in models.values()]
        rows.append((kind, last[kind]["difficulty"], str(last[kind]["n"]), *scores))
    return "By kind of exercise\n" + _columns(("kind", "level", "n", *models), rows)


def kinds_in_order(by_kind: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Easy kinds first, within a difficulty the best learnt first."""
    key = {kind: (LEVELS.index(entry["difficulty"]), -entry["score"], kind) for kind, entry in by_kind.items()}
    return sorted(by_kind, key=key.__getitem__)


def score_text(data: Mapping[str, Any] | None) -> str:
    """`93.2 ± 1.4`, in percent; at 0 and 100, where that interval is 0, Wilson's bound; nothing for a model that was
    not asked."""
    if data is None:
        return ""
    if data["score"] == 0:
        return f"0.0 (≤ {100 * data['high']:.1f})"
    if data["score"] == 1:
        return f"100.0 (≥ {100 * data['low']:.1f})"
    return f"{100 * data['score']:.1f} ± {100 * data['ci95']:.1f}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(head), "  ".join("─" * width for width in widths), *map(line, rows)])
