"""`herd bench serve`: how a running server behaves under load, Herd's or any other that is OpenAI-compatible."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.options import numbers
from herd.cli.output import emit, table, visible

if TYPE_CHECKING:
    from herd.serve.load.generator import LoadConfig, Loaded

_KEYS = ("HERD_API_KEY", "OPENAI_API_KEY")
_SHOWN = {"ttft": "first token", "tpot": "each further token", "gap": "gap between events", "e2e": "whole answer"}
_PERCENTILES = ("p50", "p90", "p99", "max")


def command(
    url: Annotated[str, typer.Argument(help="The server: http://localhost:8000, https://api.example.com/v1, …")],
    rate: Annotated[float | None, typer.Option(help="Requests per second, at random times.  [default: 1]")] = None,
    rates: Annotated[str | None, typer.Option(metavar="1,2,4", help="Several such rates, one after the other.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest rate that holds, beginning at --rate.")
    ] = False,
    concurrency: Annotated[
        str | None, typer.Option(metavar="1,8,…", help="Instead, so many clients that each wait for their answer.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of a stage.  [default: 30]")] = None,
    requests: Annotated[int | None, typer.Option(help="Or its number of requests.")] = None,
    warmup: Annotated[int, typer.Option(help="Requests that are sent before and not counted.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 120.0,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    model: Annotated[str | None, typer.Option(help="Its name  [default: the server's first]")] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help=f"Sent with every request  [default: {' or '.join(_KEYS)}]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Words of a prompt, each one token for a Llama.")] = 128,
    shared_prefix: Annotated[int, typer.Option(help="Further words in front, the same for all.")] = 0,
    max_tokens: Annotated[str, typer.Option(metavar="N|A-B", help="Tokens of an answer at most.")] = "128",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='Send these: JSON lines with "prompt" or "messages".')
    ] = None,
    extra: Annotated[
        str, typer.Option(metavar="JSON", help="Further fields of every request; null removes one.")
    ] = "{}",
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and lengths.")] = 0,
    slo: Annotated[
        str, typer.Option(metavar="KEY=SECONDS,…", help="What a good answer is: ttft, tpot, e2e.")
    ] = "ttft=1.0,tpot=0.1",
    records: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every request as a JSON line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Load a server with streamed requests and measure what its users would see.

    Requests come at random times that no slow answer changes, and each is timed from when it was due. Every stream is
    checked to the end. A stage's goodput is the requests per second that met --slo; the knee is the highest rate at
    which 90 % of all requests did. No percentile is shown that so few requests cannot show. Ctrl-C ends early and
    reports what there is.

    Examples:

        herd bench serve http://localhost:8000 --rate 2 --duration 60

        herd bench serve localhost:8080 --sweep --slo ttft=0.5,tpot=0.05 --extra '{"ignore_eos": true}'

        herd bench serve localhost:8000 --concurrency 1,8,32 --prompt-tokens 512 --max-tokens 64-256 --json

        herd bench serve localhost:8000 --rates 1,2,4 --prompts questions.jsonl --records requests.jsonl
    """
    from herd.config import parse_config
    from herd.errors import UsageError
    from herd.serve.load.generator import LoadConfig, run

    if sum(option is not None for option in (rate, rates, concurrency)) > 1:
        raise UsageError("--rate, --rates and --concurrency are three kinds of load", allowed="one of them")
    if records is not None and (records.is_dir() or not records.absolute().parent.is_dir()):
        raise UsageError("--records cannot be written there", value=records, allowed="a file in a folder that exists")
    options = {
        "url": url,
        "endpoint": endpoint,
        "model": model,
        "rates": _rates(rate, rates, concurrency),
        "concurrency": numbers("--concurrency", concurrency, 1, 10_000) if concurrency is not None else [],
        "sweep": sweep,
        "duration": 30.0 if duration is None and requests is None else duration,
        "requests": requests,
        "warmup": warmup,
        "timeout": timeout,
        "prompt_tokens": prompt_tokens,
        "shared_prefix": shared_prefix,
        "max_tokens": _range(max_tokens),
        "prompts": prompts,
        "extra": _object(extra),
        "seed": seed,
        **_objectives(slo),
    }
    config = parse_config(LoadConfig, options, "herd bench serve")
    key = api_key or next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)
    loaded = run(config, key)
    if records is not None:
        _write(records, loaded, config)
    emit(loaded.result, as_json, lambda: _show(loaded.result))
    if loaded.result["interrupted"]:
        return 130
    return 0 if loaded.answered else 4


def _rates(rate: float | None, rates: str | None, concurrency: str | None) -> list[float]:
    from herd.errors import UsageError

    if concurrency is not None:
        return []
    if rates is None:
        return [1.0 if rate is None else rate]
    try:
        return [float(part) for part in rates.split(",")]
    except ValueError:
        raise UsageError("--rates is no list of numbers", value=rates, allowed="numbers, as 0.5,1,2") from None


def _range(text: str) -> list[int]:
    from herd.errors import UsageError

    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError("--max-tokens is no range", value=text, allowed="a number, or two as 64-256")
    return [int(parts[0]), int(parts[-1])]


def _object(text: str) -> dict[str, Any]:
    from herd.errors import UsageError

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UsageError("--extra is no JSON object", value=text, allowed='as {"ignore_eos": true}')
    return data


def _objectives(text: str) -> dict[str, float | None]:
    """Bounds by name; those that are not named are none."""
    from herd.errors import UsageError

    try:
        pairs = [part.strip().split("=") for part in text.split(",")]
        bounds = {key: float(value) for key, value in pairs}
    except ValueError:
        bounds = {"": 0.0}
    if bounds.keys() - {"ttft", "tpot", "e2e"}:
        allowed = "ttft, tpot or e2e with seconds, as ttft=1.0,tpot=0.1"
        raise UsageError("--slo is no list of bounds", value=text, allowed=allowed)
    return {key: bounds.get(key) for key in ("ttft", "tpot", "e2e")}


def _write(path: Path, loaded: Loaded, config: LoadConfig) -> None:
    from herd.files import atomic_write
    from herd.serve.load.figures import as_row

    with atomic_write(path, "w") as file:
        for stage, found in zip(loaded.result["stages"], loaded.records, strict=True):
            load = {key: stage["load"][key] for key in ("rate", "clients")}
            for record in found:
                file.write(json.dumps(load | as_row(record, config.objectives)) + "\n")


def _show(result: Mapping[str, Any]) -> None:
    from herd.serve.load.notes import name

    stages = result["stages"]
    print(visible(f"{result['url']}, model {result['model']}"))
    if len(stages) > 1:
        print("\n" + _overview(stages))
    for stage in stages if len(stages) == 1 else ():
        print("\n".join(["", f"{name(stage['load'])}: {_counts(stage)}", "", *_details(stage)]))
    if result["knee"] is not None:
        print(f"\n{_knee(result['knee'])}")
    print("\n" + "\n".join(visible(f"note: {note}") for note in result["notes"]))


def _counts(stage: Mapping[str, Any]) -> str:
    requests = stage["requests"]
    return f"{requests['due']:,} requests in {stage['seconds']['due']:,.1f} s, {requests['ok']:,} answered"


def _details(stage: Mapping[str, Any]) -> Iterator[str]:
    """The figures of one stage."""
    rows = [[label, *_cells(stage[key]), stage[key]["n"]] for key, label in _SHOWN.items()]
    yield table(["milliseconds", *_PERCENTILES, "of"], rows)
    yield ""
    for error in stage["errors"]:
        after = f", {error['with_retry_after']} with Retry-After" if error["outcome"] == "refused" else ""
        status = f" {error['status']}" if error["status"] and error["outcome"] != "broken" else ""
        detail = f" ({error['detail']})" if error["detail"] else ""
        yield visible(f"{error['count']:,} × {error['outcome'].replace('_', ' ')}{status}{after}{detail}")
    throughput, tokens, goodput = stage["throughput"], stage["tokens"], stage["goodput"]
    read = "" if tokens["input"] is None else f", {tokens['input']:,} tokens read"
    cached = "" if not tokens["cached"] else f", {tokens['cached']:,} of them from the server's cache"
    yield (
        f"throughput {_number(throughput['output_tokens_per_second'])} tokens/s, "
        f"{_number(throughput['requests_per_second'])} requests/s over {stage['seconds']['total']:,.1f} s; "
        f"{tokens['output']:,} tokens written{read}{cached}"
    )
    bounds = ", ".join(f"{key} ≤ {value:g} s" for key, value in goodput["objectives"].items() if value is not None)
    share = ""
    if goodput["interval"]:
        interval = "–".join(f"{100 * each:.1f}" for each in goodput["interval"])
        share = f", {100 * goodput['share']:.1f} % (95 % interval {interval})"
    yield (
        f"goodput {_number(goodput['requests_per_second'])} requests/s: {goodput['good']:,} of "
        f"{stage['requests']['due']:,} met {bounds or 'no bound but a whole answer'}{share}"
    )
    client = stage["client"]
    late = f", sent at most {1000 * client['late']['max']:.1f} ms late" if client["late"]["n"] else ""
    yield f"client: {client['cpu_share']:.0%} of a processor{late}"


def _overview(stages: list[dict[str, Any]]) -> str:
    """A line for each stage."""
    from herd.serve.load.notes import name

    headings = ["", "due", "answered", "refused", "failed", "goodput/s", "good", "tokens/s"]
    headings += ["ttft ms p50", "p90", "max", "tpot ms p50", "p90", "max"]
    rows = []
    for stage in stages:
        requests, goodput = stage["requests"], stage["goodput"]
        failed = sum(requests[key] for key in ("http_error", "broken", "timeout", "connection"))
        row = [name(stage["load"]), requests["due"], requests["ok"], requests["refused"], failed]
        row += [_number(goodput["requests_per_second"]), "" if goodput["share"] is None else f"{goodput['share']:.0%}"]
        row += [_number(stage["throughput"]["output_tokens_per_second"])]
        for key in ("ttft", "tpot"):
            row += _cells(stage[key], ("p50", "p90", "max"))
        rows.append(row)
    return table(headings, rows)


def _knee(knee: Mapping[str, Any]) -> str:
    if knee["rate"] is None:
        found = "there is none" if knee["fails_at"] is None else f"none: {knee['fails_at']:g}/s is already too much"
    else:
        beyond = "no rate failed" if knee["fails_at"] is None else f"{knee['fails_at']:g}/s is too much"
        beyond += " for this client, perhaps not for the server" if knee["client_limited"] else ""
        found = f"{knee['rate']:g}/s, goodput {_number(knee['goodput'])}/s ({knee['share']:.0%}); {beyond}"
    return f"knee: {found}\n({knee['definition']})"


def _cells(spread: Mapping[str, Any], keys: tuple[str, ...] = _PERCENTILES) -> list[str]:
    marks = {key: "> " if key in spread["at_least"] else "" for key in keys}
    return ["" if spread[key] is None else f"{marks[key]}{_milliseconds(spread[key])}" for key in keys]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}" if seconds >= 0.001 else f"{1000 * seconds:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
