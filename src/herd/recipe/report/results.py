"""The report's sections on training curves, evaluation, samples and quantised files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herd.evaluate.needle.picture import heat_map
from herd.evaluate.table import LEVELS, kinds_in_order, score_text
from herd.recipe.report.charts import Interval, Series, bars, interval_rows, line_chart, smooth
from herd.recipe.report.data import RunData, Training
from herd.recipe.report.html import Child, Html, join, table, tag
from herd.recipe.report.sections import Section
from herd.recipe.units import count, counted, duration, size

_ROLES = ("s2", "s1", "s3", "s4")
_MFU_NOTE = (
    "MFU counts 6·N + 6·L·H·K·S FLOPs for every token, and the output matrix for supervised ones only: an upper bound "
    "where documents are shorter than a row."
)
_TITLES = {"base": "Pretraining", "sft": "Instruction tuning"}


def training_section(run: RunData, stage: str) -> Section | None:
    """Loss, learning rate, speed and gradient norm over the steps of one training stage."""
    training = run.training.get(stage)
    if training is None:
        return None
    loss = training.curve("loss")
    series = [
        Series("training loss, each step", loss, "s1", faint=True),
        Series("training loss, trend", smooth(loss), "s1"),
        Series("held-out loss", training.curve("heldout_loss"), "s2", dots=True),
    ]
    small = [
        ("Learning rate", training.curve("lr"), False),
        ("Tokens a second", training.curve("tokens_per_second"), True),
        ("Gradient norm", training.curve("grad_norm"), True),
        ("MFU, share of the measured peak", training.curve("mfu"), True),
    ]
    pictures = [_small(title, points, noisy) for title, points, noisy in small if len(points) > 1]
    body = join(
        [
            tag("p", _training_words(training)),
            tag("h3", "Loss, nats per token"),
            line_chart(series, label=f"Loss over the steps of the stage {stage}", height=340),
            tag("div", pictures, class_="pair"),
            tag("p", _MFU_NOTE, class_="note") if training.curve("mfu") else None,
        ]
    )
    return Section(stage, _TITLES.get(stage, stage), body)


def _small(title: str, points: Sequence[tuple[float, float]], noisy: bool) -> Html:
    """One of several little pictures, from zero; a noisy one gets its trend over it."""
    series = [Series(title, points, "s3", faint=noisy)]
    if noisy:
        series.append(Series(f"{title}, trend", smooth(points), "s3"))
    picture = line_chart(series, label=f"{title} over steps", x_label="", zero=True, height=330)
    return tag("div", tag("h3", title), picture)


def _training_words(training: Training) -> str:
    last = training.rows[-1]["step"] if training.rows else None
    steps = f"{int(last):,} steps" if last is not None else ""
    tokens = f"{count(training.tokens)} tokens" if training.tokens else ""
    speed = training.tokens / training.manifest["wall_seconds"] if training.manifest["wall_seconds"] else 0
    rate = f"{speed:,.0f} tokens a second with everything counted" if training.tokens else ""
    facts = ", ".join(part for part in (steps, tokens, duration(training.manifest["wall_seconds"]), rate) if part)
    return facts + "."


def needle_section(run: RunData) -> Section | None:
    """Heat maps of the numbers found in long texts, before and after the context was extended."""
    state = run.result("extend", "extension.json")
    if not state:
        return None
    stages = [f"stage-{stage['plan']['context']}" for stage in state["stages"]]
    grids = {"before": run.result("extend", "before/needle.json")}
    grids |= {stage: run.result("extend", f"{stage}/needle/needle.json") for stage in stages}
    parts: list[Child] = [
        tag("p", f"Bits per byte of short text: {state['short_before']:.4f} before"),
        *(tag("p", f"{stage['plan']['context']:,} tokens: {stage['short']:.4f}") for stage in state["stages"]),
    ]
    for name, results in grids.items():
        if results:
            title = "Numbers found before" if name == "before" else f"Numbers found after {name}"
            parts += [tag("h3", title), tag("figure", Html(heat_map(results)))]
    return Section("extend", "Longer context", join(parts))


def evaluation_section(run: RunData) -> Section | None:
    """Bits per byte beside compressors; exact match by kind with intervals, before and after."""
    results = run.evaluation
    if not results:
        return None
    parts: list[Child] = []
    if run.bits:
        some = next(iter(results["bits_per_byte"].values()))
        rows = [(_model_name(name), value, "s1") for name, value in run.bits.items()]
        rows += [(name, value, "s0") for name, value in run.compressors.items()]
        parts += [
            tag("h3", "Bits per byte on held-out text"),
            tag(
                "p",
                f"{counted(some['documents'], 'document')}, {size(some['bytes'])}, never trained on. Less is better. "
                "The compressors read the same text as one stream and learn as they go; the model was trained before.",
                class_="note",
            ),
            bars(sorted(rows, key=lambda row: row[1]), label="Bits per byte of models and compressors"),
        ]
    if results.get("exact_match"):
        parts += _exact_match(results)
    return Section("evaluation", "Evaluation", join(parts))


def _exact_match(results: Mapping[str, Any]) -> list[Child]:
    models: dict[str, Any] = results["exact_match"]
    names = [(_model_name(label), _ROLES[i % len(_ROLES)]) for i, label in enumerate(models)]
    rows = score_rows(models)
    marks = [
        (
            row.name,
            [_mark(name, entry, role) for (name, role), entry in zip(names, row.entries, strict=True) if entry],
        )
        for row in rows
    ]
    cells: list[list[Child]] = [
        [
            tag("b", row.name) if row.summary else row.name,
            row.level,
            f"{row.n:,}",
            *(tag("b", score_text(entry)) if row.summary else score_text(entry) for entry in row.entries),
        ]
        for row in rows
    ]
    return [
        tag("h3", "Exact match on held-out exercises"),
        tag(
            "p",
            f"{rows[0].n:,} questions about Python whose answers were checked by running it (small talk excepted). An "
            "answer counts when it is right to the letter. Bars are 95 % intervals (Wilson's). ",
            comparison_text(results.get("comparison")),
            class_="note",
        ),
        interval_rows(marks, names, label="Exact match by kind of exercise"),
        tag(
            "p",
            "In the table: percent ± 1.96·√(S(1−S)/N), the interval of the Llama 3 paper; at 0 and 100, where that is "
            "0, Wilson's bound.",
            class_="note",
        ),
        table(["kind", "level", "N", *(name for name, _ in names)], cells, numeric=range(2, 3 + len(models))),
    ]


def samples_section(run: RunData) -> Section | None:
    """Continuations and answers as they came, not picked by hand."""
    results = run.evaluation
    parts: list[Child] = []
    for label, samples in results.get("samples", {}).items():
        shown = samples[: run.config.samples]
        if shown:
            parts.append(tag("h3", f"{_model_name(label)} continues a text"))
            parts += [
                tag(
                    "div",
                    tag("pre", tag("span", sample["prompt"], class_="prompt"), sample["completion"]),
                    class_="sample",
                )
                for sample in shown
            ]
    dialogs = results.get("dialogs", [])[: run.config.exercises]
    if dialogs:
        parts.append(tag("h3", "Answers to held-out exercises"))
        parts += [_dialog(dialog) for dialog in dialogs]
    if not parts:
        return None
    return Section(
        "samples", "Samples", join([tag("p", "The first ones in order, good and bad.", class_="note"), *parts])
    )


def _dialog(dialog: Mapping[str, Any]) -> Html:
    """A question, the true answer, and what each model said."""
    answer = str(dialog["answer"]).strip()
    turns = [_turn(f"{dialog['kind']}, {dialog['difficulty']}", dialog["question"]), _turn("true answer", answer)]
    for label, said in dialog["said"].items():
        verdict = "right" if said == answer else "wrong"
        turns.append(_turn([_model_name(label), " ", tag("span", verdict, class_=verdict)], said))
    return tag("div", turns, class_="sample")


def _turn(who: Child, text: str) -> Html:
    shown = tag("pre", text) if text.strip() else tag("span", "(nothing)", class_="muted")
    return tag("div", tag("span", who, class_="who"), shown, class_="turn")


def quantised_section(run: RunData) -> Section | None:
    """Sizes of the quantised files and what each costs in bits per byte."""
    results = run.quantised
    if not results:
        return None
    rows: list[list[Child]] = []
    for name, entry in results["formats"].items():
        rows.append(
            [
                "as trained" if name == results["source"] else name,
                entry["file"],
                size(entry["bytes"]),
                f"{entry['bits_per_weight']:.2f}",
                *bits_and_cost(results, name),
                f"{entry['tokens_per_s']:,.0f}",
            ]
        )
    scored = f", each scored again on {size(results['bytes'])} of held-out text" if results["bytes"] else ""
    return Section(
        "quantised",
        "Quantised",
        join(
            [
                tag("p", f"The final model as GGUF files{scored}, and how many tokens a second it answers with."),
                table(
                    ["format", "file", "size", "bits per weight, file and all", "bits per byte", "cost", "tokens/s"],
                    rows,
                    numeric=(2, 3, 4, 5, 6),
                ),
            ]
        ),
    )


def bits_and_cost(results: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Bits per byte of a format, and what it adds to the source's; empty where no text was held out."""
    own, source = (results["formats"][key]["bits_per_byte"] for key in (name, results["source"]))
    if own is None or source is None:
        return "", ""
    return f"{own:.4f}", "" if name == results["source"] else f"{own - source:+.4f}"


@dataclass(frozen=True)
class ScoreRow:
    """One line of an exact-match table: the score of each model, None where it was not asked."""

    name: str
    level: str
    entries: list[Mapping[str, Any] | None]
    summary: bool = False

    @property
    def n(self) -> int:
        """Questions behind the line."""
        return max(int(entry["n"]) for entry in self.entries if entry)


def score_rows(models: Mapping[str, Any]) -> list[ScoreRow]:
    """All exercises, each level, then each kind: easy ones first, within a level the best learnt first."""
    last = list(models.values())[-1]["by_kind"]
    levels = [level for level in LEVELS if any(level in data["by_difficulty"] for data in models.values())]
    rows = [ScoreRow("all", "", [data["overall"] for data in models.values()], summary=True)]
    for level in levels:
        entries = [data["by_difficulty"].get(level) for data in models.values()]
        rows.append(ScoreRow(f"all {level}", "", entries, summary=True))
    for kind in kinds_in_order(last):
        entries = [data["by_kind"].get(kind) for data in models.values()]
        rows.append(ScoreRow(kind, last[kind]["difficulty"], entries))
    return rows


def comparison_text(data: Mapping[str, Any] | None) -> str:
    """The paired comparison of before and after in one sentence."""
    if not data:
        return ""
    return (
        f"From {_model_name(data['before'])} to {_model_name(data['after'])}: {100 * data['difference']:+.1f} ± "
        f"{100 * data['ci95']:.1f} points; {data['gained']:,} gained, {data['lost']:,} lost "
        f"(McNemar p = {data['p_value']:.2g})."
    )


def _mark(name: str, entry: Mapping[str, Any], role: str) -> Interval:
    text = f"{name}: {entry['correct']} of {entry['n']}, {100 * entry['score']:.1f} %"
    return Interval(entry["score"], entry["low"], entry["high"], role, text)


def _model_name(label: str) -> str:
    """`base` and `sft` in words; other labels as they are."""
    names: Sequence[tuple[str, str]] = (("base", "base model"), ("sft", "tuned model"))
    for key, name in names:
        if label == key or label.startswith(f"{key}, "):
            return name + label[len(key) :]
    return label
