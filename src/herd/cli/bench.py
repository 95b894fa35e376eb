"""`herd bench`: how fast a model runs here, beside what the machine could do and, if asked for, beside llama.cpp."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from herd.cli.options import numbers, usable_threads
from herd.cli.output import emit, table

if TYPE_CHECKING:
    from herd.engine.backend import Backend, BackendOptions
    from herd.engine.measure import Limits, Speeds, Spread, Work


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured: a prompt of `prompt` tokens, or steps of `batch` sequences that hold `depth` tokens each."""

    prompt: int = 0
    batch: int = 1
    depth: int = 0
    steps: int = 0

    @property
    def name(self) -> str:
        if self.prompt:
            return f"prefill {self.prompt}"
        return f"decode {self.batch}" + (f" at depth {self.depth}" if self.depth else "")

    @property
    def length(self) -> int:
        """Context that it takes."""
        return self.prompt + self.depth + self.steps


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file, run directory or pulled repository.")],
    quant: Annotated[
        str | None, typer.Option(help="How weights are held: q8_0, q4_k_m, bf16, … (default: as is)")
    ] = None,
    ctx: Annotated[int | None, typer.Option(help="Tokens of context (default: what is measured needs).")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    kv: Annotated[str, typer.Option(help="How the cache is held: bf16, f32 or int8.")] = "bf16",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt whose speed is measured.")] = 512,
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,8,32",
    depth: Annotated[
        str, typer.Option(help="Tokens that are there before; beyond the first depth, only the first batch.")
    ] = "0,4096",
    steps: Annotated[int, typer.Option(help="Tokens a sequence decodes in a repetition.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Of every measurement.")] = 5,
    against: Annotated[
        str | None, typer.Option(metavar="PROGRAM", help="llama.cpp's llama-bench, to run on the same GGUF file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how fast a model runs: loading, prompts, one answer and many at once.

    Speeds are medians in tokens per second. "of bandwidth" is the share of this machine's memory bandwidth that reading
    weights and cache takes up, "of peak" the share of its arithmetic that multiplying by the weights does; both limits
    are measured too, by the same kernels. Another program takes turns with Herd, on the same file with as many threads;
    a ratio above 1 means that Herd is faster.

    Examples:

        herd bench runs/pocket

        herd bench model.gguf --threads 8 --against build/bin/llama-bench

        herd bench Llama-3.2-1B --quant q8_0 --depth 0,8000 --json

        herd bench serve --help    # loads a running server instead; a model of that name is ./serve
    """
    from herd import checkpoint
    from herd.engine.backend import BackendOptions, KvType, open_backend
    from herd.engine.request import check_whole
    from herd.errors import UsageError
    from herd.progress import status

    if kv not in get_args(KvType):
        raise UsageError("unknown cache type", value=kv, allowed=", ".join(get_args(KvType)))
    counts = {"--prompt": prompt, "--steps": steps, "--repetitions": repetitions, "--threads": threads}
    for option, value in counts.items():
        if value is not None:
            check_whole(option, value, 1, 1 << 30 if option != "--threads" else 4096)
    depths, sizes = numbers("--depth", depth, 0, 1 << 30), numbers("--batches", batches, 1, 128)
    path = checkpoint.resolve(model)
    program = None if against is None else _program(against, path, quant)
    wanted = [Measurement(prompt=prompt)]
    wanted += [Measurement(batch=size, depth=depths[0], steps=steps) for size in sizes]
    wanted += [Measurement(batch=sizes[0], depth=further, steps=steps) for further in depths[1:]]
    with checkpoint.open_checkpoint(path) as opened:
        room = opened.config.context_length if ctx is None else ctx
    fitting = [each for each in dict.fromkeys(wanted) if each.length <= room]
    if not fitting:
        raise UsageError(
            "nothing that is to be measured fits the context", value=room, fix="a lower --prompt or --steps"
        )
    needed = max(each.length for each in fitting)
    options = BackendOptions(path, quant, ctx or needed, usable_threads(threads), cast(KvType, kv))
    status("loading …")
    start = time.perf_counter()
    backend = open_backend("native", options)
    loaded = time.perf_counter() - start
    try:
        result = _measure(backend, options, fitting, repetitions, program, loaded)
    finally:
        backend.close()
        status("")
    beyond = f"needs more than the {room} tokens of context"
    result["skipped"] = [f"{each.name}: {beyond}" for each in wanted if each not in fitting] + result["skipped"]
    emit(result, as_json, lambda: _show(result))


def _program(name: str, model: Path, quant: str | None) -> str:
    from herd.errors import UsageError
    from herd.ggufmeta import MAGIC

    if quant is not None:
        raise UsageError("--against compares on the same file, so --quant cannot change it", value=quant)
    if not model.is_file() or model.open("rb").read(4) != MAGIC:
        raise UsageError(
            "--against needs a GGUF file", value=model, fix="herd quantize MODEL model.gguf --type q8_0 makes one"
        )
    program = shutil.which(name)
    if program is None:
        raise UsageError("there is no such program", value=name, fix="build llama.cpp, and give its bin/llama-bench")
    return program


def _measure(
    backend: Backend,
    options: BackendOptions,
    wanted: list[Measurement],
    repetitions: int,
    program: str | None,
    loaded: float,
) -> dict[str, Any]:
    from herd import _native
    from herd.architecture import parameter_count
    from herd.engine.measure import limits, peak_memory, work_of
    from herd.errors import ResourceError
    from herd.progress import status

    memory = {"loading": peak_memory()}
    threads = backend.threads
    speeds: dict[Measurement, dict[str, Spread]] = {}
    machine: Limits | None = None
    skipped = []
    for each in wanted:
        try:
            speeds[each] = _speeds(backend, options, each, repetitions, program)
        except ResourceError as error:
            skipped.append(f"{each.name}: {error}")
        memory.setdefault("first_measurement", peak_memory())
        status("measuring the machine …")
        found = limits(threads)
        machine = found if machine is None else machine.best(found)
    assert machine is not None
    work = work_of(options.path, options.quant, options.kv)
    return {
        "model": str(options.path),
        "parameters": parameter_count(work.config),
        "weight_bytes": work.weight_bytes,
        "quant": options.quant,
        "kv": options.kv,
        "context": options.ctx,
        "threads": threads,
        "cpu": _native.cpu_name(),
        "isa": _native.isa(),
        "load_seconds": loaded,
        "peak_memory_bytes": memory,
        "limits": dataclasses.asdict(machine),
        "measurements": [_row(each, both, work, machine) for each, both in speeds.items()],
        "skipped": skipped,
    }


def _speeds(
    backend: Backend, options: BackendOptions, what: Measurement, repetitions: int, program: str | None
) -> dict[str, Spread]:
    """Tokens per second of Herd and of the other program, which take turns."""
    from herd.engine.measure import PEER_CACHE, measure_decode, measure_llama_bench, measure_prefill, spread
    from herd.progress import status

    runs: dict[str, Speeds] = {}
    if program is not None and what.batch == 1:
        cache = PEER_CACHE[options.kv]
        runs["peer"] = measure_llama_bench(
            program,
            options.path,
            backend.threads,
            prompt=what.prompt,
            steps=what.steps,
            depth=what.depth,
            options=("-ctk", cache, "-ctv", cache),
        )
    if what.prompt:
        runs["herd"] = measure_prefill(backend, what.prompt)
    else:
        runs["herd"] = measure_decode(backend, what.batch, what.depth, what.steps)
    values: dict[str, list[float]] = {name: [] for name in runs}
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(contextlib.closing(run))
        for i in range(repetitions):
            for name, run in runs.items():
                status(f"{what.name}: {name}, {i + 1} of {repetitions} …")
                values[name].append(next(run))
    return {name: spread(found) for name, found in values.items()}


def _row(what: Measurement, found: dict[str, Spread], work: Work, machine: Limits) -> dict[str, Any]:
    """A measurement for people and programs; shares are of the median."""
    from herd.engine.measure import shares

    ours, peer = found["herd"], found.get("peer")
    read, computed = shares(work, machine, ours.median, **dataclasses.asdict(what))
    return {
        "what": what.name,
        **dataclasses.asdict(what),
        "tokens_per_second": dataclasses.asdict(ours),
        "share_of_bandwidth": read,
        "share_of_peak": computed,
        "peer_tokens_per_second": None if peer is None else dataclasses.asdict(peer),
        "ratio": None if peer is None else ours.median / peer.median,
    }


def _show(result: dict[str, Any]) -> None:
    memory, machine = result["peak_memory_bytes"], result["limits"]
    print(
        f"{result['model']}: {result['parameters']:,} parameters in {result['weight_bytes'] / 1e6:,.1f} MB, "
        f"cache in {result['kv']}, threads: {result['threads']}, {result['isa']}"
    )
    print(
        f"loaded in {result['load_seconds']:.2f} s; memory at most {memory['loading'] / 1e6:,.0f} MB while loading, "
        f"{memory['first_measurement'] / 1e6:,.0f} MB with the first measurement"
    )
    print(
        f"this machine reads {machine['bandwidth'] / 1e9:.1f} GB/s and computes {machine['int8'] / 1e9:,.0f} (int8) or "
        f"{machine['f32'] / 1e9:,.0f} (f32) billion operations a second\n"
    )
    rows = result["measurements"]
    compared = any(row["ratio"] is not None for row in rows)
    print(table(["", "tok/s", "low", "high", "of bandwidth", "of peak", *(["peer", "ratio"] if compared else [])], [
        _cells(row, compared) for row in rows
    ]))  # fmt: skip
    for line in result["skipped"]:
        print(f"skipped {line}")


def _cells(row: dict[str, Any], compared: bool) -> list[str]:
    speed, read = row["tokens_per_second"], row["share_of_bandwidth"]
    cells = [row["what"], *(f"{speed[key]:,.1f}" for key in ("median", "low", "high"))]
    # More than memory gives: the weights of a small model stay in the caches.
    shown = "" if read is None else f"{read:.0%}" if read <= 1.0 else "from the caches"
    cells += [shown, f"{row['share_of_peak']:.0%}"]
    if compared and row["ratio"] is None:
        cells += ["", ""]
    elif compared:
        cells += [f"{row['peer_tokens_per_second']['median']:,.1f}", f"{row['ratio']:.2f}×"]
    return cells
