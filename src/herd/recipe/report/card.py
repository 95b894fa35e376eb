"""MODEL_CARD.md: what the model is, what made it, what it cost, how good it is and is not. Generated from the run.

The fields are those of Meta's Llama cards (hardware, energy, carbon with its formula) and of Hugging Face's model cards
(the block at the top).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from herd.corpus import STDLIB
from herd.evaluate.table import score_text
from herd.recipe.report.config import CARBON_REASON, WATTS_REASON
from herd.recipe.report.data import RunData
from herd.recipe.report.results import bits_and_cost, comparison_text, score_rows
from herd.recipe.report.sections import headline, shape_rows, uncounted
from herd.recipe.units import count, counted, duration, scientific, size

# What `herd.corpus` calls its ways to split, in words.
_SPLITS = {"module": "split by module", "module by rank": "split by module", "tail": "cut from the ends of documents"}


def render_card(run: RunData) -> str:
    """The whole card as Markdown."""
    parts = [
        _front_matter(run),
        f"# {_line(run.name)}",
        _line(headline(run)),
        _line(run.description),
        _architecture(run),
        _data(run),
        _training(run),
        _energy(run),
        _evaluation(run),
        _quantised(run),
        _use(run),
        _limitations(run),
        f"## Licence\n\nWeights: {_line(run.config.licence)}. Training text: {_data_licence(run)}.",
        _repeat(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(run: RunData) -> str:
    licence = run.config.licence
    known = re.fullmatch(r"[A-Za-z0-9.-]+", licence)
    lines = [f"license: {licence.lower()}" if known else f"license: other\nlicense_name: {json.dumps(licence)}"]
    lines += ["library_name: llama-herd", "pipeline_tag: text-generation", "tags:\n- llama\n- herd"]
    return "---\n" + "\n".join(lines) + "\n---"


def _data_licence(run: RunData) -> str:
    sources = run.result("corpus", "stats.json").get("config", {}).get("sources")
    known = "PSF-2.0 (the Python standard library)" if sources == [STDLIB] else "that of its sources"
    return _line(run.config.data_licence or known)


def _architecture(run: RunData) -> str:
    if run.model is None:
        return ""
    rows = [*shape_rows(run.model), ("parameters", f"{run.parameters:,}")]
    return "## Architecture\n\n" + _table(["", ""], rows, right=(1,))


def _data(run: RunData) -> str:
    stats = run.result("corpus", "stats.json")
    if not stats:
        return ""
    sources = ", ".join(f"`{source}`" for source in stats.get("config", {}).get("sources", []))
    tokenizer = run.result("tokenizer", "results.json")
    lines = [f"Sources: {_line(sources)}. " if sources else ""]
    lines[0] += (
        f"After cleaning and removal of duplicates {counted(stats['train_documents'], 'document')} "
        f"({size(stats['train_bytes'])}) for training"
    )
    if stats["heldout_documents"]:
        lines[0] += f" and {stats['heldout_documents']:,} ({size(stats['heldout_bytes'])}) held out"
        lines[0] += f", {_SPLITS.get(str(stats.get('split')), 'split by document')}"
    lines[0] += "."
    if tokenizer:
        part, text = ("heldout", "held-out") if tokenizer["heldout"]["tokens"] else ("train", "training")
        lines.append(
            f"Tokenizer: byte-level byte-pair encoding with Llama 3's split rules, {tokenizer['vocab_size']:,} tokens, "
            f"{tokenizer[part]['bytes_per_token']:.2f} bytes per token on the {text} text."
        )
    if "sft" in run.manifests:
        tuned = run.result("sft", "result.json")
        seen = ""
        if {"dialogs", "dialog_tokens", "rehearsal_tokens"} <= tuned.keys():
            seen = (
                f" {tuned['dialogs']:,} dialogues ({tuned['dialog_tokens']:,} tokens), and "
                f"{tuned['rehearsal_tokens']:,} tokens of the training text again."
            )
        lines.append(
            "Instruction tuning: questions about Python and their answers in the Llama 3 chat format, both generated "
            "by program; the answers were checked by running real Python (small talk excepted), no person's "
            f"conversation is in them.{seen}"
        )
    return "## Data\n\n" + "\n\n".join(lines)


def _training(run: RunData) -> str:
    rows: list[Sequence[str]] = []
    for name, training in run.training.items():
        compute = training.compute
        last = training.rows[-1]["step"] if training.rows else None
        # The trainer's own figure is a mean over its last steps; the last line of the metrics is one batch or few.
        heldout, loss = training.total("heldout_loss"), training.total("loss")
        shown = f"{heldout:.3f} held out" if heldout is not None else f"{loss:.3f}" if loss is not None else ""
        rows.append(
            (
                name,
                f"{int(last):,}" if last is not None else "",
                f"{training.tokens:,}" if training.tokens else "",
                shown,
                duration(training.manifest["wall_seconds"]),
                scientific(compute.flops) if compute else "",
                f"{compute.pflop_days:.2e}" if compute else "",
            )
        )
    if not rows:
        return ""
    first = next((training.compute for training in run.training.values() if training.compute), None)
    parts = [
        _table(
            ["stage", "steps", "tokens", "last loss, nats/token", "time", "FLOPs", "petaFLOP-days"],
            rows,
            right=range(1, 7),
        )
    ]
    if first:
        parts.append(
            f"FLOPs = 6·N·D + 6·L·H·K·S·D: N = {first.weights:,} multiplying weights, D tokens, L layers, H heads of "
            "width K, S tokens in a row; forward and backward; an upper bound where documents are shorter than a row. "
            "In tuning, the output matrix counts for supervised tokens only."
        )
    return "## Training\n\n" + "\n\n".join(parts)


def _energy(run: RunData) -> str:
    if not run.manifests:
        return ""
    energy = run.energy()
    machine = list(run.manifests.values())[-1]["host"]
    gpus = f"; GPU: {', '.join(run.gpus)}" if run.gpus else ""
    rows = [
        ("hardware", f"{machine['cores']} cores of {machine['cpu']}{gpus}"),
        ("time, all stages", duration(run.wall_seconds)),
        ("busy core-hours, h", f"{energy.hours:.3f}"),
        ("watts per busy core, W", f"{energy.watts:g}"),
        ("power usage effectiveness, PUE", f"{energy.pue:g}"),
        ("kg CO2 per kWh", f"{energy.kg_per_kwh:g}"),
        ("energy", f"{1000 * energy.kwh:.1f} Wh"),
        ("carbon", f"{1e6 * energy.tonnes_co2:.1f} g CO2 ({scientific(energy.tonnes_co2)} t)"),
    ]
    return (
        "## Energy and carbon\n\n"
        + _table(["", ""], rows, right=(1,))
        + "\n\ntCO2 = h × W × PUE × kg/kWh ÷ 10⁶, as in Meta's Llama cards. "
        + f"The watts are {WATTS_REASON}. PUE and kg/kWh by default: {CARBON_REASON}. {uncounted(run)}".rstrip()
    )


def _evaluation(run: RunData) -> str:
    results = run.evaluation
    if not results:
        return ""
    parts: list[str] = []
    if run.bits:
        some = next(iter(results["bits_per_byte"].values()))
        both = [*run.bits.items(), *run.compressors.items()]
        parts.append(
            f"Bits per byte on {counted(some['documents'], 'held-out document')} ({size(some['bytes'])}); less is "
            "better:\n\n" + _table(["", "bits per byte"], [(name, f"{value:.3f}") for name, value in both], right=(1,))
        )
    if models := results.get("exact_match"):
        rows = [
            (
                f"**{row.name}**" if row.summary else row.name,
                row.level,
                f"{row.n:,}",
                *(score_text(entry) for entry in row.entries),
            )
            for row in score_rows(models)
        ]
        parts.append(
            "Exact match on held-out exercises, percent ± 95 % interval, CI95(S) = 1.96·√(S(1−S)/N), and Wilson's "
            "bound at 0 and 100, where that is 0:\n\n"
            + _table(["kind", "level", "N", *models], rows, right=range(2, 3 + len(models)))
        )
        if sentence := comparison_text(results.get("comparison")):
            parts.append(sentence)
    return "## Evaluation\n\n" + "\n\n".join(parts)


def _quantised(run: RunData) -> str:
    results = run.quantised
    if not results:
        return ""
    rows = [
        (
            "as trained" if name == results["source"] else name,
            f"`{entry['file']}`",
            size(entry["bytes"]),
            *bits_and_cost(results, name),
        )
        for name, entry in results["formats"].items()
    ]
    return "## Files\n\n" + _table(["format", "file", "size", "bits per byte", "cost"], rows, right=(2, 3, 4))


def _use(run: RunData) -> str:
    return "\n".join(
        [
            "## How to run it",
            "",
            "```",
            "herd chat RUN_DIRECTORY",
            'herd generate RUN_DIRECTORY "def"',
            "```",
            "",
            "With Herd installed from its source. The GGUF files follow llama.cpp's conventions; the checkpoint "
            "directories have the Hugging Face layout.",
        ]
    )


def _limitations(run: RunData) -> str:
    tuned = ", and in a chat only the kinds of questions it was tuned on" if "sft" in run.manifests else ""
    epochs = run.result("base", "result.json").get("epochs", 0.0)
    read = f", which it read {epochs:.1f} times" if epochs > 1 else ""
    said = [
        f"It knows its training text and nothing else: no facts about the world{tuned}.",
        "It states wrong answers as confidently as right ones. No safety training and no guard is part of this run.",
        f"It may repeat passages of its training text word for word{read}.",
    ]
    if run.parameters and run.model:
        said.insert(
            0,
            f"It is small ({count(run.parameters)} parameters, context of {run.model.context_length:,} tokens): meant "
            "for learning how such models are made and for tests, not for use in products.",
        )
    results = run.evaluation.get("exact_match", {})
    if results:
        last = list(results.values())[-1]["by_kind"]
        weak = [kind for kind, entry in sorted(last.items(), key=lambda item: item[1]["score"]) if entry["score"] < 0.5]
        if weak:
            said.append(f"It fails more often than not at: {', '.join(weak)}.")
    return "## Limitations\n\n" + "\n".join(f"- {_line(sentence)}" for sentence in [*said, *run.config.limitations])


def _repeat(run: RunData) -> str:
    if not run.manifests:
        return ""
    last = list(run.manifests.values())[-1]
    versions = {"Python": last["host"]["python"], **last["packages"]}
    timed = ""
    if exact := run.fixed_steps:
        timed = f" Time limits decided the number of steps; as many without a clock: `{' '.join(exact)}`."
    return (
        f"## Repeat it\n\n`{_line(run.command)}`, seed {run.seed}, with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".{timed}"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """A Markdown table; columns in `right` are aligned to the right."""
    numeric = frozenset(right)
    rules = ["---:" if i in numeric else "---" for i in range(len(headings))]
    lines = [headings, rules, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """Text that cannot break out of its line, and that is not markup of HTML."""
    return re.sub(r"\s+", " ", text).strip().replace("<", "&lt;")
