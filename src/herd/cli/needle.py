"""`herd needle`: numbers hidden in long texts, a grid of lengths and depths, and its heat map."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.options import Loading, numbers, takes_groups
from herd.cli.output import emit, table


@takes_groups
def command(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint directory, a GGUF file or a pulled repository.")],
    lengths: Annotated[
        str | None, typer.Option(metavar="512,1024,…", help="Tokens of prompt and answer together.")
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(metavar="N|0,0.5,…", help="So many depths from 0 to 1, or a list of them.  [default: 11]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts in each cell.  [default: 1]")] = None,
    digits: Annotated[int | None, typer.Option(help="Digits of the numbers.  [default: 7]")] = None,
    needles: Annotated[int | None, typer.Option(help="Numbers hidden in a prompt.  [default: 1]")] = None,
    ask: Annotated[int | None, typer.Option(help="How many of them are asked for.  [default: all]")] = None,
    distractors: Annotated[int | None, typer.Option(help="Further numbers, never asked for.  [default: 0]")] = None,
    haystack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text file, *.jsonl or folder to hide them in; may be repeated.  [default: python-stdlib]",
        ),
    ] = None,
    generator_tokens: Annotated[
        int | None, typer.Option(help="Repeat this many first tokens of the text.  [default: all of it]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published grid: easycontext, gradient-1, gradient-2, gradient-3; other options change it."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the numbers and of random places.  [default: 0]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of cells and results; a grid begun there goes on.")] = Path(
        "needle"
    ),
    *,
    loading: Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")] = False,
) -> None:
    """Hide numbers in long texts and ask for them: which lengths and depths does a model really read?

    Writes cells.jsonl (a line for each cell; an interrupted grid goes on there), needle.json, needle.html and
    needle.png into --out. Answers are greedy, so the same seed gives the same results.

    Examples:

        herd needle runs/pocket --lengths 256,384,512 --depths 5

        herd needle model.gguf --lengths 2048,8192,32768 --samples 10 --haystack essays/ --out needles-8b

        herd needle model.gguf --lengths 4096 --needles 4 --ask 2 --json

        herd needle Llama-3-8B-4194k --preset gradient-3 --haystack books/ --kv int8
    """
    from herd.config import parse_config
    from herd.engine import LLM
    from herd.errors import MissingDependency, UsageError
    from herd.evaluate.needle import PRESETS, NeedleConfig, even_depths, run, write_page, write_png

    if preset is not None and preset not in PRESETS:
        raise UsageError("there is no such preset", value=preset, allowed=", ".join(PRESETS))
    if preset is None and lengths is None:
        raise UsageError("no lengths are given", fix="--lengths 512,1024, or --preset " + next(iter(PRESETS)))
    options: dict[str, Any] = {"depths": even_depths(11)} if preset is None else dict(PRESETS[preset])
    given = {
        "lengths": None if lengths is None else numbers("--lengths", lengths, 1, 1 << 30),
        "depths": None if depths is None else _depths(depths),
        "samples": samples, "digits": digits, "needles": needles, "ask": ask, "distractors": distractors,
        "haystack": haystack or None, "generator_tokens": generator_tokens, "seed": seed,
    }  # fmt: skip
    options |= {name: value for name, value in given.items() if value is not None}
    config = parse_config(NeedleConfig, options, "herd needle")
    arguments = loading.arguments()
    with LLM(model, **arguments) as llm:
        results = run(config, llm, out, loading=arguments)
    write_page(results, out / "needle.html")
    try:
        write_png(results, out / "needle.png")
    except MissingDependency as error:
        sys.stderr.write(f"herd: no needle.png: {error}\n")
    emit(results, as_json, lambda: _show(results, out))


def _depths(text: str) -> list[float] | tuple[float, ...]:
    """ "5" are five depths from 0 to 1; "0,0.5" or "0.5" are the depths themselves."""
    from herd.errors import UsageError
    from herd.evaluate.needle import even_depths

    if text.isdecimal() and 2 <= int(text) <= 1000:
        return even_depths(int(text))
    try:
        if text.isdecimal():
            raise ValueError
        return [float(part) for part in text.split(",")]
    except ValueError:
        allowed = "a count from 2 to 1000, or depths from 0 to 1 as 0,0.25,0.5"
        raise UsageError("--depths is no count and no list", value=text, allowed=allowed) from None


def _show(results: dict[str, Any], out: Path) -> None:
    lengths = [row["length"] for row in results["by_length"]]
    shares = {(cell["length"], cell["depth"]): f"{100 * cell['score']:.0f}" for cell in results["cells"]}
    rows = [
        [f"{100 * row['depth']:.0f}%", *(shares[length, row["depth"]] for length in lengths)]
        for row in results["by_depth"]
    ]
    print("% found, by depth and length in tokens\n")
    print(table(["depth", *(f"{length:,}" for length in lengths)], rows))
    overall = results["overall"]
    low, high = 100 * overall["low"], 100 * overall["high"]
    print(f"\n{overall['correct']:,} of {overall['n']:,} numbers found: {100 * overall['score']:.1f} %, ", end="")
    print(f"95 % interval {low:.1f} to {high:.1f}; {out / 'needle.html'} shows the heat map")
