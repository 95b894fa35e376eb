"""Charts as inline SVG: lines over steps, and rows of points with intervals. Colours come from the page's CSS.

Coordinates are in viewBox units; text stays text, so it can be selected, searched and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from herd.recipe.report.html import Child, Html, join, tag

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 14, 40
_MAX_POINTS = 320


@dataclass(frozen=True)
class Series:
    """One line: `role` picks its colour (s1, s2, …); `faint` is a thin background line; `dots` marks each point."""

    label: str
    points: Sequence[tuple[float, float]]
    role: str = "s1"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Interval:
    """One mark in a row: a value with the ends of its interval (equal to it when there is none)."""

    value: float
    low: float
    high: float
    role: str
    text: str


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    height: int = 300,
    zero: bool = False,
) -> Html:
    """Lines over a common x axis. `label` says in words what the picture shows, for readers who cannot see it."""
    series = [item for item in (_clean(item) for item in series) if item.points]
    if not series:
        return Html("")
    xs = [x for item in series for x, _ in item.points]
    ys = _robust([y for item in series for _, y in item.points])
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(ys), max(ys)
    if zero:
        y_low = min(0.0, y_low)
    pad = (y_high - y_low) * 0.06 or abs(y_high) * 0.05 or 1.0
    y_low, y_high = (y_low if zero and y_low == 0 else y_low - pad), y_high + pad
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def place_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * inner_width

    def place_y(y: float) -> float:
        return _TOP + (1 - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)) * inner_height

    y_ticks = ticks(y_low, y_high, 5)
    grid: list[Child] = []
    for value in y_ticks:
        y = round(place_y(value), 1)
        grid.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        grid.append(tag("text", tick_text(value, y_ticks), x=_LEFT - 8, y=y + 4, class_="tick end"))
    x_ticks = ticks(x_low, x_high, 7)
    for value in x_ticks:
        x = round(place_x(value), 1)
        grid.append(tag("text", tick_text(value, x_ticks), x=x, y=height - _BOTTOM + 20, class_="tick mid"))
    if x_label:
        grid.append(tag("text", x_label, x=WIDTH - _RIGHT, y=height - 4, class_="tick end"))
    drawn = [_line(item, place_x, place_y) for item in series]
    picture = _svg(height, label, grid, drawn)
    return tag("figure", legend([(item.label, item.role) for item in series if not item.faint]), picture)


def interval_rows(
    rows: Sequence[tuple[str, Sequence[Interval]]], legend_entries: Sequence[tuple[str, str]], *, label: str
) -> Html:
    """Rows on a common axis from 0 to 100 %: one mark with its interval per entry. Values are shares, 0 to 1."""
    left, step, top = 150, 34, 24
    height = top + step * len(rows) + 30
    inner = WIDTH - left - 30

    def place(share: float) -> float:
        return round(left + min(max(share, 0.0), 1.0) * inner, 1)

    parts: list[Child] = []
    for percent in (0, 25, 50, 75, 100):
        x = place(percent / 100)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=height - 28, class_="grid"))
        for y_text in (14, height - 8):  # the rows are many: the axis stands above them and below
            parts.append(tag("text", f"{percent} %", x=x, y=y_text, class_="tick mid"))
    for index, (name, marks) in enumerate(rows):
        y = top + step * index + step / 2
        parts.append(tag("text", name, x=left - 14, y=y + 4, class_="row end"))
        for offset, mark in enumerate(marks):
            y_mark = y + (offset - (len(marks) - 1) / 2) * 9
            bar = tag(
                "line", x1=place(mark.low), x2=place(mark.high), y1=y_mark, y2=y_mark, class_=f"whisker {mark.role}"
            )
            dot = tag("circle", cx=place(mark.value), cy=y_mark, r=4.5, class_=f"dot {mark.role}")
            parts.append(tag("g", tag("title", mark.text), bar, dot))
    return tag("figure", legend(legend_entries), _svg(height, label, parts))


def bars(rows: Sequence[tuple[str, float, str]], *, label: str) -> Html:
    """Horizontal bars from zero: (name, value, role), the value written at its end."""
    left, step, top = 190, 32, 4
    height = top + step * len(rows) + 4
    widest = max((value for _, value, _ in rows), default=1.0) or 1.0
    parts: list[Child] = []
    for index, (name, value, role) in enumerate(rows):
        y = top + step * index
        width = round(max(value, 0.0) / widest * (WIDTH - left - 110), 1)
        parts.append(tag("text", name, x=left - 14, y=y + 20, class_="row end"))
        parts.append(tag("rect", x=left, y=y + 6, width=width, height=step - 12, rx=3, class_=f"bar {role}"))
        parts.append(tag("text", f"{value:.3f}", x=left + width + 10, y=y + 20, class_="row value"))
    return tag("figure", _svg(height, label, parts))


def smooth(points: Sequence[tuple[float, float]], share: float = 0.03) -> list[tuple[float, float]]:
    """A trend that lags little: at each point the least squares line through the nearest `share` of the points, at
    least 5. At the ends, where they lie on one side, a mean would lag and a single point would be no trend."""
    half = max(2, round(len(points) * share / 2))
    width = min(2 * half + 1, len(points))
    result = []
    for i, (x, _) in enumerate(points):
        first = min(max(0, i - half), len(points) - width)
        result.append((x, _line_through(points[first : first + width], x)))
    return result


def _line_through(points: Sequence[tuple[float, float]], at: float) -> float:
    """Value at `at` of the least squares line."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y + slope * (at - mean_x)


def thin(points: Sequence[tuple[float, float]], limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points that keep each stretch's lowest and highest value, so that spikes stay visible."""
    if len(points) <= limit:
        return list(points)
    result = []
    stretches = limit // 2
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        result += sorted({low, high})
    if result[-1] != points[-1]:
        result.append(points[-1])
    return result


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 × 10ⁿ apart) inside an interval."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """A tick as short as its neighbours allow: 1,000 · 25k · 0.003 · 3e-05."""
    if value == 0:
        return "0"
    largest = max(abs(tick) for tick in all_ticks)
    if largest >= 20_000:
        return f"{value / 1000:,.6g}k"
    if largest < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.6g}"


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """Names of the lines, each after its colour; nothing for a single one, which its heading names."""
    keys = [tag("span", tag("i", class_=f"key {role}"), name) for name, role in entries]
    return tag("figcaption", keys) if len(entries) > 1 else Html("")


def _clean(item: Series) -> Series:
    points = [(x, y) for x, y in item.points if math.isfinite(x) and math.isfinite(y)]
    return Series(item.label, thin(points), item.role, item.faint, item.dots)


def _robust(values: list[float]) -> list[float]:
    """The values without the top half percent when those would stretch the axis more than three times."""
    ordered = sorted(values)
    if len(ordered) < 50:
        return ordered
    cut = ordered[math.ceil(len(ordered) * 0.995) - 1]
    return [value for value in ordered if value <= cut] if ordered[-1] > 3 * max(cut, 0.0) else ordered


def _line(item: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> Html:
    spots = [(round(place_x(x), 1), round(place_y(y), 1)) for x, y in item.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in spots)
    parts: list[Child] = [tag("path", d=path, class_=f"line {item.role}{' faint' if item.faint else ''}")]
    if item.dots or len(spots) == 1:
        for (x, y), (x_value, y_value) in zip(spots, item.points, strict=True):
            hint = tag("title", f"{item.label}, {x_value:,.0f}: {y_value:.4g}")
            parts.append(tag("circle", hint, cx=x, cy=y, r=3.2, class_=f"dot {item.role}"))
    return join(parts)


def _svg(height: float, label: str, *parts: Child) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)
