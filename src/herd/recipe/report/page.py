"""report.html: one self-contained page. Nothing is loaded from anywhere and no script runs, by its own policy."""

from __future__ import annotations

import re

from herd import __version__
from herd.recipe.report.data import RunData
from herd.recipe.report.html import Child, Html, join, tag
from herd.recipe.report.results import (
    evaluation_section,
    needle_section,
    quantised_section,
    samples_section,
    training_section,
)
from herd.recipe.report.sections import (
    Section,
    corpus_section,
    cost_section,
    headline,
    model_section,
    repeat_section,
    stages_section,
    tokenizer_section,
)
from herd.recipe.report.style import CSS
from herd.recipe.units import count, duration, size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(run: RunData) -> str:
    """The whole page as text."""
    found = [
        stages_section(run),
        corpus_section(run),
        tokenizer_section(run),
        model_section(run),
        *(training_section(run, stage) for stage in run.training),
        needle_section(run),
        evaluation_section(run),
        samples_section(run),
        quantised_section(run),
        cost_section(run),
        repeat_section(run),
    ]
    sections = [section for section in found if section is not None]
    links = [tag("a", section.title, href=f"#{section.id}") for section in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: report"),
        tag("style", Html(CSS)),
    )
    body = tag(
        "div",
        tag("nav", tag("a", "Herd", href="#top", class_="mark"), links, aria_label="Sections"),
        tag(
            "main",
            tag("h1", run.name, id="top"),
            tag("p", _unbroken(headline(run)), class_="lede"),
            tag("p", run.description, class_="muted") if run.description else None,
            _tiles(run),
            [_section(section) for section in sections],
            tag(
                "footer",
                f"Written by Herd {__version__} from the run's own files. The model card stands beside this page.",
            ),
        ),
        class_="page",
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def _section(section: Section) -> Html:
    return tag("section", tag("h2", section.title, id=section.id), section.body)


def _tiles(run: RunData) -> Html:
    """The figures a reader looks for first."""
    tiles: list[Child] = []
    if run.bits:
        name, value = run.best_compressor
        tiles.append(
            _tile(
                "Held-out text, base model",
                f"{next(iter(run.bits.values())):.3f}",
                "bits/byte",
                f"{name}: {value:.3f}" if name else "",
            )
        )
    match = run.evaluation.get("exact_match", {})
    if match:
        first, last = next(iter(match.values()))["overall"], match.get("sft", list(match.values())[-1])["overall"]
        before = f"before tuning: {100 * first['score']:.1f} %" if len(match) > 1 else f"{last['n']:,} exercises"
        tiles.append(_tile("Exact match", f"{100 * last['score']:.1f}", f"± {100 * last['ci95']:.1f} %", before))
    if run.parameters and run.model:
        tiles.append(
            _tile("Parameters", count(run.parameters), "", f"{run.model.n_layers} layers of width {run.model.dim:,}")
        )
    base = run.training.get("base")
    if base and base.tokens:
        tiles.append(_tile("Training tokens", count(base.tokens), "", f"in {duration(base.manifest['wall_seconds'])}"))
    formats = run.quantised.get("formats", {})
    if "q8_0" in formats:
        figure, unit = size(formats["q8_0"]["bytes"]).split(" ")
        tiles.append(_tile("As Q8_0", figure, unit, formats["q8_0"]["file"]))
    whole = duration(run.wall_seconds)
    tiles.append(_tile("Whole run", whole, "", f"{1000 * run.energy().kwh:.1f} Wh estimated"))
    return tag("div", tiles, class_="tiles")


def _tile(label: str, figure: str, unit: str, note: str) -> Html:
    return tag(
        "div",
        join(
            [
                tag("span", label, class_="label"),
                tag("b", figure, tag("small", unit) if unit else None),
                tag("span", note),
            ]
        ),
        class_="tile",
    )


def _unbroken(text: str) -> str:
    """Figures stay on one line with their units."""
    return re.sub(r"(\d) (?=(?:s|min|h|B|kB|MB|GB|TB)\b)", "\\1\u00a0", text)
