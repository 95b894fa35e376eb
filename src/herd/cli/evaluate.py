"""`herd evaluate`: bits per byte of texts, exact match on exercises, one model or two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.options import Loading, takes_groups
from herd.cli.output import emit


@takes_groups
def command(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint directory, a GGUF file or a pulled repository.")],
    bpb: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Score this text, *.jsonl or folder in bits per byte; may be repeated."),
    ] = None,
    exercises: Annotated[
        int | None, typer.Option(metavar="N", help="Ask N held-out exercises.  [default: 500 without --bpb]")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Evaluate this model as well and compare: before → after.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the exercises.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write results.json and results.txt into this folder.")] = None,
    *,
    loading: Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")] = False,
) -> None:
    """Measure a model: bits per byte beside compressors, exact match with 95 % intervals.

    Examples:

        herd evaluate runs/pocket --exercises 300

        herd evaluate runs/pocket --bpb notes.txt --bpb posts.jsonl

        herd evaluate model-q4_0.gguf --before runs/pocket --bpb notes.txt --json

        herd evaluate runs/pocket --quant q4_k_m --kv int8
    """
    import tempfile

    from herd.config import parse_config
    from herd.corpus import read_sources
    from herd.errors import UsageError
    from herd.evaluate import EvaluateConfig, results_table, run

    if before == model:
        raise UsageError("--before is the model itself, so there is nothing to compare", value=before)
    count = exercises if exercises is not None else (0 if bpb else 500)
    options = {"seed": seed, "exercises": count, "few_shot": False, "samples": 0}
    config = parse_config(EvaluateConfig, options, "herd evaluate")
    if not (count or bpb):
        raise UsageError("there is nothing to measure", allowed="--exercises N from 1, --bpb FILE, or both")
    texts = [document.text for document in read_sources(bpb)] if bpb else []
    models = {before: before, model: model} if before else {model: model}
    arguments = loading.arguments()
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, Any] = run(config, models, texts, out or scratch, **arguments)
    emit(results, as_json, lambda: print(results_table(results)))
