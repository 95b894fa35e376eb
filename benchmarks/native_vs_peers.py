"""Herd's native engine against OpenVINO or Hugging Face transformers: the same random weights, as many threads.

    python benchmarks/native_vs_peers.py [--folder FOLDER] --peer openvino|hf [--peer-python PYTHON] [--shape 1b|15m]
        [--cases …] [--rounds 3] [--threads N] [--json]

As in native_vs_llamacpp.py, every measurement is a process of its own that loads the model, warms up and measures
once; who goes first changes from round to round, and every figure is a median. A peer is tried with several settings,
and the best one's median counts. Models are made by shapes.py; OpenVINO's are converted from Hugging Face's form. All
are kept in FOLDER. Above 1, a ratio says that Herd is better: faster, sooner or smaller.

The peer's packages are its Python's own: openvino-genai, optimum-intel and nncf; or torch and transformers. OpenVINO
has symmetric weights of 4 bits in groups (embedding and head of 8 bits, as in q4_0) or of 8 bits with a scale for a
row; inputs are rounded to 8 bits as Herd's are, in groups of 32, and its cache has 8 bits by default, all others'
bfloat16. transformers computes in bfloat16, where compiled with weights as constants too ("frozen").

"Load" is within a process, after Python has imported its packages; "start to first token" is the whole process with a
prompt of 16 tokens; "peak memory" is of a process with a prompt of 512. For Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import native_vs_llamacpp
from native_vs_llamacpp import CASES, Case, cells, herd_command, row, run, value_of
from shapes import make

from herd.cgroup import usable_cpus
from herd.engine import measure
from herd.errors import HerdError
from herd.progress import status

LOAD = Case("load", "load", unit="s", prompt=512)
MEASURED = {
    "prefill": CASES["prefill"],
    "decode": CASES["decode"],
    "decode-512": Case("decode-512", "decode", depth=512, steps=128),
    "load": LOAD,
    "first-token": CASES["first-token"],
    "memory": CASES["memory"],
}
TEXTS = native_vs_llamacpp.TEXTS | {"decode-512": "decode 128 tokens after 512", "load": "load"}
PAIRS = {
    "openvino": {"q4_0": "int4", "q8_0": "int8"},
    "hf": {"bf16": "bf16", "q8_0": "bf16", "q4_0": "bf16"},
}
"""By peer, formats of Herd and what they are compared with."""
WEIGHTS = {"int4 group 32": (4, 32), "int4 group 64": (4, 64), "int8": (8, 0)}
"""OpenVINO's: bits, and weights that share a scale."""
PIPELINES = {"paged": {"ATTENTION_BACKEND": "PA"}, "stateful": {"ATTENTION_BACKEND": "SDPA"}}
COMPILED = {
    "eager": {"compiled": False, "static": False, "inductor": {}},
    "compiled": {"compiled": True, "static": True, "inductor": {}},
    "frozen": {"compiled": True, "static": True, "inductor": {"freezing": True}},
}


def settings(peer: str, case: Case) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What to try for a case: its name, which begins with the weights' kind, the model, and the worker's setting."""
    if peer == "hf":
        # Compiling takes far longer than the first token.
        for name in COMPILED if case.unit == "tok/s" else ["eager"]:
            yield f"bf16, {name}", "hf", COMPILED[name]
        return
    for weights in WEIGHTS:
        for name, properties in PIPELINES.items():
            yield f"{weights}, {name}", weights, properties
    yield "int8, paged, inputs by 128", "int8", PIPELINES["paged"] | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}


def models(options: argparse.Namespace) -> dict[str, Path]:
    """All files and directories, Herd's and the peer's, by format; missing ones are made."""
    found = {name: make(options.shape, name, options.folder) for name in [*PAIRS[options.peer], "hf"]}
    for name, (bits, group) in WEIGHTS.items() if options.peer == "openvino" else ():
        path = options.folder / f"{found['hf'].name}-openvino-{name.replace(' ', '-')}"
        if not path.exists():
            status(f"converting to {name} …")
            facts = {"kind": "convert", "peer": options.peer, "model": str(found["hf"])}
            run(peer_command(options, facts | {"setting": {"to": str(path), "bits": bits, "group": group}}))
        found[name] = path
    return found


def peer_command(options: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """The worker of the other program."""
    worker = Path(__file__).with_name("peer_worker.py")
    return [str(options.peer_python), str(worker), json.dumps(facts | {"threads": options.threads})]


def commands(case: Case, files: dict[str, Path], options: argparse.Namespace) -> dict[str, list[str]]:
    """All command lines that measure a case, by name: Herd's formats, and the peer's settings."""
    found = {}
    for name in PAIRS[options.peer]:
        found[name] = herd_command(case, files[name], options.threads)
        if case is LOAD:
            found[name][1] = __file__
    sizes = {"prompt": case.prompt, "depth": case.depth, "steps": case.steps}
    for name, model, setting in settings(options.peer, case):
        facts = {"kind": case.kind, "peer": options.peer, "model": str(files[model]), "setting": setting}
        found[name] = peer_command(options, facts | sizes)
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in turns; a table for each pair of weights."""
    files = models(options)
    cases = [MEASURED[name] for name in options.cases]
    values: dict[tuple[Case, str], list[float]] = {}
    failed: dict[tuple[Case, str], str] = {}
    ours = PAIRS[options.peer]
    machine: list[measure.Limits] = []
    for turn in range(options.rounds):
        limits = run(herd_command(CASES["decode"], files[next(iter(ours))], options.threads, "limits"))[0]
        machine.append(measure.Limits(**json.loads(limits)))
        for case in cases:
            tried = list(commands(case, files, options).items())
            for who, command in reversed(tried) if turn % 2 else tried:
                if (case, who) in failed:
                    continue
                status(f"round {turn + 1} of {options.rounds}: {TEXTS[case.name]}, {who} …")
                try:
                    values.setdefault((case, who), []).append(value_of(case, command, json.loads))
                except HerdError as error:
                    if who in ours:
                        raise
                    failed[case, who] = str(error)
    status("")
    values = {key: found for key, found in values.items() if key not in failed}
    tables = []
    for name, weights in ours.items():
        facts = measure.work_of(files[name], None, "bf16")
        chosen = {
            (case, "herd" if who == name else who): found
            for (case, who), found in values.items()
            if who == name or (who not in ours and who.startswith(weights))
        }
        rows = [row(case, chosen, facts, machine) for case in cases]
        for line in rows:
            line["peer"] = line.pop("llama.cpp", None)
        tables.append({"herd": name, "peer": weights, "rows": rows})
    return {
        "shape": options.shape,
        "peer": options.peer,
        "threads": options.threads,
        "limits": {name: statistics.median(getattr(m, name) for m in machine) for name in asdict(machine[0])},
        "tables": tables,
        "failed": [f"{TEXTS[case.name]}, {who}: {why}" for (case, who), why in failed.items()],
    }


def show(result: dict[str, Any]) -> None:
    """Tables for people."""
    limits = result["limits"]
    print(f"\nThe machine reads {limits['bandwidth'] / 1e9:.1f} GB/s; threads: {result['threads']}.")
    for table in result["tables"]:
        print(f"\n### {result['shape']}: herd {table['herd']}, {result['peer']} {table['peer']}\n")
        print(f"| what | herd | low to high | {result['peer']} | low to high | setting | ratio | of bandwidth |")
        print("|---|---|---|---|---|---|---|---|")
        for line in table["rows"]:
            peer = cells(line["peer"], line["unit"]) if line["peer"] else ["", ""]
            ratio = f"{line['ratio']:.2f}×" if "ratio" in line else ""
            share = line.get("share_of_bandwidth")
            found = [TEXTS[line["what"]], *cells(line["herd"], line["unit"]), *peer, line.get("setting", ""), ratio]
            print("| " + " | ".join([*found, "" if share is None else f"{share:.0%}"]) + " |")
        print("\nall settings' medians:")
        for line in table["rows"]:
            tried = (f"{name} {found:,.4g}" for name, found in line.get("settings", {}).items())
            print(f"- {TEXTS[line['what']]} ({line['unit']}): " + "; ".join(tried))
    for text in result["failed"]:
        print(f"\nfailed: {text}")


def herd_load(path: Path, threads: int, prompt: int) -> float:
    """Seconds until the engine is ready for a prompt."""
    from herd.engine.backend import BackendOptions, open_backend

    start = time.perf_counter()
    open_backend("native", BackendOptions(path, None, prompt, threads, "bf16"))
    return time.perf_counter() - start


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/models"), help="where the models are kept")
    parser.add_argument("--peer", choices=PAIRS, required=True)
    parser.add_argument("--peer-python", metavar="PYTHON", default=sys.executable, help="default: this Python")
    parser.add_argument("--shape", default="1b", help="1b, 15m, or a path to a model")
    parser.add_argument("--cases", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--json", action="store_true", help="results as JSON instead of tables")
    options = parser.parse_args()
    result = compare(options)
    print(json.dumps(result, indent=2)) if options.json else show(result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        facts = json.loads(sys.argv[2])
        print(json.dumps(herd_load(Path(facts["path"]), facts["threads"], facts["prompt"])))
    else:
        main()
