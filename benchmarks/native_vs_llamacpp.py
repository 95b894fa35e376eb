"""Herd's native engine against llama.cpp: the same files, as many threads, every figure a median of interleaved runs.

    python benchmarks/native_vs_llamacpp.py [--folder FOLDER] [--shape 1b|15m|MODEL] [--formats q4_0 …]
        [--llama-bench PROGRAM] [--llama-batched-bench PROGRAM] [--cases …] [--rounds 5] [--threads N] [--json]

Files are made by shapes.py and kept in FOLDER. Every measurement, Herd's and the other's, is a process of its own that
loads the file (which the system has in its file cache after the first time), warms up and measures once; who goes first
changes from round to round. llama.cpp gets its best settings: weights repacked, and where several are tried, the best
one's median counts. Its cache is float16, Herd's bfloat16. Without a program for it, a column stays empty. Above 1, a
ratio says that Herd is better: faster, sooner or smaller.

"First token" is a whole process that loads and computes a prompt of 16 tokens, Python's own start included; "load" is
from opening the file to the logits, as in a program that has imported herd (of llama.cpp: from its start to its
result). "Memory" is the most that a process with a prompt of 512 tokens has resident, pages of mapped files included.
Shares are of what the same machine reads and computes at best, measured in every round; computing is multiplying by the
weights, without attention. For Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the herd command does, before numpy

from shapes import FORMATS, make

from herd.cgroup import usable_cpus
from herd.engine import measure
from herd.errors import HerdError
from herd.progress import status


@dataclass(frozen=True)
class Case:
    """What is measured. `kind` "once" and "load": loading and one prompt; else as in `herd bench`."""

    name: str
    kind: str
    unit: str = "tok/s"
    prompt: int = 0
    batch: int = 1
    depth: int = 0
    steps: int = 0

    @property
    def context(self) -> int:
        """Tokens that each sequence needs room for."""
        return self.prompt + self.depth + self.steps


CASES = {
    case.name: case
    for case in (
        Case("decode", "decode", steps=128),
        Case("decode-deep", "decode", depth=4096, steps=64),
        Case("prefill", "prefill", prompt=512),
        Case("prefill-long", "prefill", prompt=4096),
        Case("decode-8", "batch", batch=8, depth=16, steps=32),
        Case("decode-32", "batch", batch=32, depth=16, steps=32),
        Case("first-token", "once", unit="s", prompt=16),
        Case("load", "load", unit="s", prompt=16),
        Case("memory", "once", unit="bytes", prompt=512),
    )
}
TEXTS = {
    "decode": "decode 128 tokens",
    "decode-deep": "decode 64 tokens after 4,096",
    "prefill": "prefill 512",
    "prefill-long": "prefill 4,096",
    "decode-8": "decode 8 together",
    "decode-32": "decode 32 together",
    "first-token": "start to first token",
    "load": "load to first token",
    "memory": "peak memory",
}
LONG = 4096
"""From so many tokens on, both of llama.cpp's attentions are tried."""


# --- in Herd's worker processes -----------------------------------------------------------------------------------


def work(kind: str, path: Path, threads: int, prompt: int, batch: int, depth: int, steps: int) -> Any:
    """One measurement: tokens per second, or seconds; of the machine its limits."""
    from herd.engine.backend import BackendOptions, Span, open_backend

    if kind == "limits":
        return asdict(measure.limits(threads))
    start = time.perf_counter()
    backend = open_backend("native", BackendOptions(path, None, prompt + depth + steps, threads, "bf16"))
    if kind == "prefill":
        return next(measure.measure_prefill(backend, prompt))
    if kind in ("once", "load"):
        reserved = backend.reserve(prompt)
        assert reserved is not None
        backend.step([Span(reserved[0], range(1, prompt + 1))])
        return time.perf_counter() - start
    return next(measure.measure_decode(backend, batch, depth, steps))


# --- in the coordinating process ----------------------------------------------------------------------------------


def herd_command(case: Case, path: Path, threads: int, kind: str | None = None) -> list[str]:
    """The worker that measures a case."""
    facts = {key: value for key, value in asdict(case).items() if key not in ("name", "unit")}
    facts |= {"path": str(path), "threads": threads, "kind": kind or case.kind}
    return [sys.executable, __file__, "--worker", json.dumps(facts)]


def llama_commands(case: Case, path: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Command lines of llama.cpp by their settings; none when the program for this case is not given."""
    common = ["-m", str(path), "-t", str(options.threads), "-ngl", "0"]
    if case.kind == "batch":
        if options.llama_batched_bench is None:
            return {}
        sizes = {"-npp": case.depth, "-ntg": case.steps, "-npl": case.batch, "-c": case.batch * case.context}
        arguments = [text for key, value in sizes.items() for text in (key, str(value))]
        return {"default": [options.llama_batched_bench, *common, *arguments, "--output-format", "jsonl"]}
    if options.llama_bench is None:
        return {}
    sizes = {"-p": case.prompt, "-n": case.steps, "-d": case.depth, "-r": 1}
    arguments = [options.llama_bench, *common, *(text for key, value in sizes.items() for text in (key, str(value)))]
    arguments += ["--repack", "1", "-o", "json"]
    if case.kind in ("once", "load"):
        arguments.append("--no-warmup")
        return {"mapped": arguments, "read": [*arguments, "-lm", "none"]}
    if case.context >= LONG:
        return {f"-fa {on}": [*arguments, "-fa", str(on)] for on in (1, 0)}
    return {"default": arguments}


def run(command: list[str], watch: bool = False) -> tuple[str, float, int]:
    """Standard output of a program, its seconds and, if watched, its peak of resident bytes.

    Raises HerdError when it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            while watch and process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.005)
            process.wait()
        finally:
            process.kill()
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
        if process.returncode:
            errors.seek(0)
            last = "\n  ".join((errors.read() or text).strip().splitlines()[-5:])
            raise HerdError(f"{Path(command[0]).name} failed with code {process.returncode}:\n  {last}")
    return text, seconds, peak


def resident_peak(pid: int) -> int:
    """The most memory that a running process has had resident, by the system's own record; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def value_of(case: Case, command: list[str], read: Callable[[str], float]) -> float:
    """Run a command and take the case's figure: what the program measured, or what is seen from outside."""
    if case.kind == "load" and read is read_llama:
        return seconds_to_result(command)
    text, seconds, peak = run(command, watch=case.unit == "bytes")
    return {"s": seconds, "bytes": float(peak)}[case.unit] if case.kind == "once" else read(text)


def seconds_to_result(command: list[str]) -> float:
    """Until llama-bench has printed what it measured; what it does before it loads is hardly worth mentioning."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("]"):
                return time.perf_counter() - start
    raise HerdError(f"{Path(command[0]).name} printed no result")


def read_llama(text: str) -> float:
    """The speed that llama-bench or llama-batched-bench printed."""
    if text.lstrip().startswith("["):
        return float(json.loads(text)[0]["avg_ts"])
    line = next(line for line in text.splitlines() if line.startswith("{"))
    return float(json.loads(line)["speed_tg"])


def compare(path: Path, format_name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one file."""
    facts = measure.work_of(path, None, "bf16")
    cases = [CASES[name] for name in options.cases]
    fitting = [case for case in cases if case.context <= facts.config.context_length]
    values: dict[tuple[Case, str], list[float]] = {}
    failed: dict[tuple[Case, str], str] = {}
    machine: dict[Case, list[measure.Limits]] = {case: [] for case in fitting}
    for turn in range(options.rounds):
        for case in fitting:
            commands = {"herd": herd_command(case, path, options.threads)} | llama_commands(case, path, options)
            for who in sorted(commands, reverse=turn % 2 == 1, key=lambda who: who != "herd"):
                if (case, who) in failed:
                    continue
                status(f"{format_name}, round {turn + 1} of {options.rounds}: {TEXTS[case.name]}, {who} …")
                read = json.loads if who == "herd" else read_llama
                if who == "herd":  # right before: what the memory gives changes from one minute to the next
                    limits = json.loads(run(herd_command(case, path, options.threads, "limits"))[0])
                    machine[case].append(measure.Limits(**limits))
                try:
                    values.setdefault((case, who), []).append(value_of(case, commands[who], read))
                except HerdError as error:
                    if who == "herd":
                        raise
                    failed[case, who] = str(error)
    status("")
    values = {key: found for key, found in values.items() if key not in failed}
    return {
        "format": format_name,
        "file": path.name,
        "bytes": path.stat().st_size,
        "threads": options.threads,
        "rows": [row(case, values, facts, machine[case]) for case in fitting],
        "skipped": [f"{TEXTS[case.name]}: beyond the model's context" for case in cases if case not in fitting]
        + [f"{TEXTS[case.name]}, llama.cpp, {who}: {why}" for (case, who), why in failed.items()],
    }


def row(
    case: Case, values: dict[tuple[Case, str], list[float]], facts: measure.Work, machine: list[measure.Limits]
) -> dict[str, Any]:
    """Herd, the best of the other's settings, their ratio, and Herd's shares of the machine's limits at that time."""
    spreads = {who: measure.spread(found) for (which, who), found in values.items() if which is case}
    ours = spreads.pop("herd")
    higher = case.unit == "tok/s"
    result: dict[str, Any] = {"what": case.name, "unit": case.unit, "herd": asdict(ours)}
    if spreads:
        who = (max if higher else min)(spreads, key=lambda name: spreads[name].median)
        ratio = ours.median / spreads[who].median
        result |= {"llama.cpp": asdict(spreads[who]), "setting": who, "ratio": ratio if higher else 1 / ratio}
        result["settings"] = {name: found.median for name, found in spreads.items()}
    result["limits"] = {name: statistics.median(getattr(m, name) for m in machine) for name in asdict(machine[0])}
    if higher:
        sizes = {"prompt": case.prompt, "batch": case.batch, "depth": case.depth, "steps": case.steps}
        shares = [
            measure.shares(facts, limits, speed, **sizes)
            for limits, speed in zip(machine, values[case, "herd"], strict=True)
        ]
        for name, found in zip(("share_of_bandwidth", "share_of_peak"), zip(*shares, strict=True), strict=True):
            result[name] = None if None in found else statistics.median(found)
    return result


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    print(f"\n### {result['file']}: {result['bytes'] / 1e6:,.1f} MB, threads: {result['threads']}\n")
    print("| what | herd | low to high | llama.cpp | low to high | setting | ratio | of bandwidth | of peak | memory |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for line in result["rows"]:
        peer = cells(line["llama.cpp"], line["unit"]) if "llama.cpp" in line else ["", ""]
        ratio = f"{line['ratio']:.2f}×" if "ratio" in line else ""
        parts = [line.get("share_of_bandwidth"), line.get("share_of_peak")]
        found = [TEXTS[line["what"]], *cells(line["herd"], line["unit"]), *peer, line.get("setting", ""), ratio]
        shares = ["" if part is None else f"{part:.0%}" for part in parts]
        print("| " + " | ".join([*found, *shares, f"{line['limits']['bandwidth'] / 1e9:.1f} GB/s"]) + " |")
    for text in result["skipped"]:
        print(f"\nskipped {text}")
    sys.stdout.flush()


def cells(spread: dict[str, float], unit: str) -> list[str]:
    """Median with its unit, and the range."""
    scale, digits, name = {"tok/s": (1.0, 1, "tok/s"), "s": (1.0, 3, "s"), "bytes": (1e6, 0, "MB")}[unit]
    median, low, high = (f"{spread[key] / scale:,.{digits}f}" for key in ("median", "low", "high"))
    return [f"{median} {name}", f"{low} to {high}"]


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/models"), help="where the models are kept")
    parser.add_argument("--shape", default="1b", help="1b, 15m, or a path to a model")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--llama-bench", metavar="PROGRAM")
    parser.add_argument("--llama-batched-bench", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--json", action="store_true", help="results as JSON instead of tables")
    options = parser.parse_args()
    results = []
    for format_name in options.formats:
        path = make(options.shape, format_name, options.folder)
        results.append(compare(path, format_name, options))
        if not options.json:
            show(results[-1])
    if options.json:
        print(json.dumps({"shape": options.shape, "results": results}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        facts = json.loads(sys.argv[2])
        print(json.dumps(work(**facts | {"path": Path(facts["path"])})))
    else:
        main()
