"""A grid's heat map: one self-contained HTML page whose picture is SVG, without scripts, and a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from herd.errors import MissingDependency
from herd.files import atomic_write

# From never to always found: told apart by people who see no red or green; each cell also says its share.
_COLOURS = ("#b4451a", "#f2e3c2", "#2b5fd3")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1c1a; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #1d1c1a }
svg .light { fill: #fff }
table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: right }
"""
_WIDE, _HIGH, _LEFT, _TOP = 56, 28, 64, 12  # of a cell, and of the margins, in SVG units


def write_page(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the HTML page of a needle.json's data. Texts in it are escaped, and it loads nothing."""
    with atomic_write(path, "w") as file:
        file.write(_page(results))


def write_png(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the heat map as a picture. Raises MissingDependency without matplotlib."""
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("matplotlib", extra="train") from None
    lengths, depths, scores = _grid(results)
    size = (max(4.8, 0.55 * len(lengths) + 2), max(3.0, 0.32 * len(depths) + 1.6))
    figure = Figure(figsize=(min(size[0], 24), min(size[1], 16)), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("found", _COLOURS)
    image = axes.imshow(
        [[scores[length, depth]["score"] for length in lengths] for depth in depths],
        cmap=colours, vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth")
    axes.set_title(_headline(results), loc="left", fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axes, label="found")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "Herd"})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _grid(results: Mapping[str, Any]) -> tuple[list[int], list[float], dict[tuple[int, float], Mapping[str, Any]]]:
    lengths = [row["length"] for row in results["by_length"]]
    depths = [row["depth"] for row in results["by_depth"]]
    return lengths, depths, {(cell["length"], cell["depth"]): cell for cell in results["cells"]}


def _headline(results: Mapping[str, Any]) -> str:
    overall, path = results["overall"], Path(results["model"]["path"])
    name = f"{path.parent.name}/{path.name}" if path.name in ("checkpoint", "model") else path.name
    return (
        f"{name}: {overall['correct']:,} of {overall['n']:,} found, "
        f"{_percent(overall['score'])} ({_percent(overall['low'])} to {_percent(overall['high'])})"
    )


def _page(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{row['length']:,}</td><td>{row['correct']:,} of {row['n']:,}</td><td>{_percent(row['score'])}</td>"
        f"<td>{_percent(row['low'])} to {_percent(row['high'])}</td></tr>\n"
        for row in results["by_length"]
    )
    settings = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>\n"
        for name, value in results["config"].items()
        if name not in ("lengths", "depths")
    )
    title = escape(f"Needle grid of {_headline(results)}")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>Share of the hidden numbers that the model said, by length of the prompt and depth of the first number; 95 %
intervals are Wilson's.</p>
{heat_map(results)}
<table><thead><tr><th>length</th><th>found</th><th>share</th><th>95 % interval</th></tr></thead>
<tbody>
{rows}</tbody></table>
<h2>Settings</h2>
<table><tbody>
{settings}</tbody></table>
</body></html>
"""


def heat_map(results: Mapping[str, Any]) -> str:
    """The picture alone, as SVG for a page."""
    lengths, depths, scores = _grid(results)
    width, height = _LEFT + _WIDE * len(lengths) + 8, _TOP + _HIGH * len(depths) + 36
    parts = [f'<svg viewBox="0 0 {width} {height}" style="max-width: {2 * width}px" role="img" aria-label="heat map">']
    for row, depth in enumerate(depths):
        middle = _TOP + _HIGH * row + _HIGH // 2 + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{middle}" text-anchor="end">{100 * depth:.0f} %</text>')
        for column, length in enumerate(lengths):
            cell, x = scores[length, depth], _LEFT + _WIDE * column
            said = (
                f"{length:,} tokens, depth {100 * depth:.0f} %: {cell['correct']} of {cell['n']}, "
                f"{_percent(cell['low'])} to {_percent(cell['high'])}"
            )
            light = ' class="light"' if abs(cell["score"] - 0.5) > 0.3 else ""
            parts.append(
                f'<g><title>{said}</title><rect x="{x}" y="{_TOP + _HIGH * row}" width="{_WIDE - 1}" '
                f'height="{_HIGH - 1}" fill="{colour(cell["score"])}"/><text x="{x + _WIDE // 2}" y="{middle}" '
                f'text-anchor="middle"{light}>{100 * cell["score"]:.0f}</text></g>'
            )
    for column, length in enumerate(lengths):
        x = _LEFT + _WIDE * column + _WIDE // 2
        parts.append(f'<text x="{x}" y="{height - 20}" text-anchor="middle">{length:,}</text>')
    parts.append(f'<text x="{_LEFT}" y="{height - 4}">length in tokens; depth at the left; % found</text></svg>')
    return "\n".join(parts)


def colour(score: float) -> str:
    """The colour of a share from 0 to 1, between the three stops, as #rrggbb."""
    place = min(max(score, 0.0), 1.0) * (len(_COLOURS) - 1)
    left = min(int(place), len(_COLOURS) - 2)
    low, high = (bytes.fromhex(stop[1:]) for stop in _COLOURS[left : left + 2])
    return "#" + bytes(round(a + (b - a) * (place - left)) for a, b in zip(low, high, strict=True)).hex()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
