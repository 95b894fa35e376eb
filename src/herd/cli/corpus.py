"""herd corpus: clean, deduplicate and split any text, and show what each filter took away and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.output import emit, table

if TYPE_CHECKING:
    from herd.corpus import CorpusStats


def command(
    sources: Annotated[
        list[str],
        typer.Argument(help='"python-stdlib", folders, *.jsonl, *.jsonl.gz (text or content field), text files.'),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for train.jsonl, heldout.jsonl and stats.json.")],
    heldout: Annotated[float, typer.Option(help="Share of the modules to keep out of training; 0 for none.")] = 0.04,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON on standard output.")] = False,
) -> None:
    """Clean and deduplicate raw text, and split it by module into train and held-out.

    Prints, for each step, the documents and bytes that went in and came out, the rules that removed something, and
    examples. The limits of the filters are set in a recipe (corpus.code, corpus.prose, ...).

    Examples:

        herd corpus python-stdlib --out corpus

        herd corpus notes/ pages.jsonl.gz --out corpus --heldout 0.1

        herd corpus src/ --out corpus --json
    """
    from herd.config import parse_config
    from herd.corpus import CorpusConfig, curate

    config = parse_config(CorpusConfig, {"sources": sources, "heldout_fraction": heldout}, "herd corpus")
    stats = curate(config, out)
    emit(stats.to_dict(), as_json, lambda: typer.echo(describe(stats, out)))


def describe(stats: CorpusStats, out: Path) -> str:
    """The account of a run as text."""
    from herd.recipe.units import counted

    steps = [
        [s.name, s.documents_in, s.documents_out, f"{s.bytes_in:,}", f"{s.bytes_out:,}", f"{s.seconds:.2f}"]
        for s in stats.steps
    ]
    reasons = [
        [step.name, name, reason.documents, f"{reason.bytes:,}", _cut(reason.examples[0] if reason.examples else "")]
        for step in stats.steps
        for name, reason in sorted(step.reasons.items(), key=lambda item: -item[1].bytes)
    ]
    skipped = [
        ["read", name, entry["count"], "", _cut(entry["examples"][0])]
        for name, entry in stats.sources["skipped"].items()
    ]
    parts = [table(["step", "docs in", "docs out", "bytes in", "bytes out", "seconds"], steps)]
    if skipped or reasons:
        parts.append(table(["step", "reason", "docs", "bytes", "for example"], [*skipped, *reasons]))
    overlap = "not measured" if stats.max_overlap is None else f"{stats.max_overlap:.1%}"
    parts.append(
        f"train     {counted(stats.train_documents, 'document')}, {stats.train_bytes:,} bytes\n"
        f"held-out  {counted(stats.heldout_documents, 'document')}, {stats.heldout_bytes:,} bytes"
        f" (split: {stats.split}; largest overlap with train {overlap})\n"
        f"written   {out}/train.jsonl, heldout.jsonl, stats.json"
    )
    return "\n\n".join(parts)


def _cut(text: str, limit: int = 80) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text)  # names and lines come from foreign files
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"
