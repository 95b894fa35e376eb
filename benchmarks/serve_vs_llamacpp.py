"""`herd serve` against llama.cpp's servers: the same file and threads, the same clients with a shared system prompt.

    python benchmarks/serve_vs_llamacpp.py [--llama-server PROGRAM] [--llama-python PYTHON] [--folder FOLDER]
        [--layers 16] [--dtype q4_0] [--clients 16] [--requests 48] [--rounds 3] [--threads N] [--json]

`--llama-server` is llama.cpp's own, in C++; `--llama-python` a Python with llama-cpp-python and its extra `server`.

The model has random weights in the shape of Llama 3.2 1B (or fewer layers) with a small vocabulary that is trained on
the spot, since a server needs one. Every round starts each server anew, one after the other, who goes first changes,
sends the requests of a closed loop (each client asks again when it has its answer), and stops it. Answers go on to
their full length. llama-server gets a slot with a cache of its own for each client (one cache for all was slower),
continuous batching and prompt caching. llama-cpp-python answers one request at a time, beginning from what its prompt
shares with the last one; it is told not to break off an answer when the next request comes. Figures are medians of
rounds; above 1, a ratio says that Herd is better. For Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import SHAPES, weights

from herd import checkpoint, tokenizer
from herd.cgroup import usable_cpus
from herd.progress import status
from herd.serve.load.generator import LoadConfig, run

VOCABULARY = 4096
READY = {"herd": "/ready", "llama.cpp": "/health", "llama-cpp-python": "/v1/models"}
PROMPT, PREFIX, ANSWER = 48, 400, 64  # tokens: a client's own, those that all share, of an answer


def model(folder: Path, layers: int, dtype: str) -> Path:
    """The file, written where it is missing."""
    path = folder / f"serve-{layers}-{dtype}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(statistics.__file__).parent
        texts = [file.read_text("utf-8", "replace") for file in sorted(library.glob("*.py"))[:150]]
        small = tokenizer.train(texts, VOCABULARY)
        config = replace(SHAPES["1b"], n_layers=layers, vocab_size=small.vocab_size, context_length=8192)
        checkpoint.save(path, config, weights(config), format="gguf", dtype=dtype, tokenizer=small, label=path.name)
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(command: list[str], ready: str, port: int) -> Iterator[str]:
    """A server for the time of a block, from when its path `ready` says so."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(6000):
                with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url + ready):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command[0]} ended: {log.read()[-2000:]}")
                time.sleep(0.05)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(url: str, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Output tokens a second, and times to the first token and of each further one."""
    config = LoadConfig(
        url=url,
        concurrency=(options.clients,),
        requests=options.requests,
        prompt_tokens=PROMPT,
        shared_prefix=PREFIX,
        max_tokens=(ANSWER, ANSWER),
        timeout=1200,
        warmup=1,
        seed=seed,
        extra={"ignore_eos": True},
    )
    loaded = run(config)
    (stage,), (records,) = loaded.result["stages"], loaded.records
    good = [record for record in records if record.outcome == "ok"]
    if len(good) < options.requests:
        sys.exit(f"{options.requests - len(good)} requests were not answered: {json.dumps(stage['requests'])}")
    first = sorted(record.ttft for record in good if record.ttft is not None)
    return {
        "tokens_per_s": stage["throughput"]["output_tokens_per_second"],
        "ttft_p50": first[len(first) // 2],
        "ttft_p99": statistics.quantiles(first, n=100, method="inclusive")[-1],
        "ttft_max": first[-1],
        "tpot_p50": statistics.median(record.tpot for record in good if record.tpot is not None),
    }


def main() -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/models"), help="where the model is kept")
    parser.add_argument("--llama-server", metavar="PROGRAM")
    parser.add_argument("--llama-python", metavar="PYTHON")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", default="q4_0")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    path = model(options.folder, options.layers, options.dtype)
    context = 1024  # of each client
    commands = {
        "herd": [sys.executable, "-m", "herd", "serve", f"model={path}", "--threads", str(options.threads),
                 "--ctx", str(context)],
    }  # fmt: skip
    if options.llama_server:
        commands["llama.cpp"] = [
            options.llama_server, "-m", str(path), "-t", str(options.threads), "-np", str(options.clients),
            "-c", str(context * options.clients), "--jinja", "--no-kv-unified", "--no-webui",
        ]  # fmt: skip
    if options.llama_python:
        commands["llama-cpp-python"] = [
            options.llama_python, "-m", "llama_cpp.server", "--model", str(path), "--n_threads", str(options.threads),
            "--n_threads_batch", str(options.threads), "--n_ctx", str(context), "--interrupt_requests", "false",
        ]  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(options.rounds):
        for name in sorted(commands, reverse=turn % 2 == 1):
            status(f"round {turn + 1} of {options.rounds}: {name} …")
            with serving(commands[name], READY[name], free_port()) as url:
                found[name].append(measure(url, options, turn))
    status("")
    medians = {
        name: {key: statistics.median(round_[key] for round_ in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    report(medians, found, options, path)


def report(
    medians: dict[str, dict[str, float]], rounds: dict[str, Any], options: argparse.Namespace, path: Path
) -> None:
    """A table, or JSON."""
    if options.json:
        print(json.dumps({"file": path.name, "medians": medians, "rounds": rounds}, indent=2))
        return
    print(f"\n### {path.name}: {options.clients} clients, {options.requests} requests, threads: {options.threads}\n")
    peers = [name for name in medians if name != "herd"]
    print("| what | herd |" + "".join(f" {name} | ratio |" for name in peers) + "\n|---|---|" + "---|---|" * len(peers))
    names = {
        "tokens_per_s": "output tokens a second",
        "ttft_p50": "first token, median, s",
        "ttft_p99": "first token, 99th percentile, s",
        "ttft_max": "first token, slowest, s",
        "tpot_p50": "each further token, median, s",
    }
    for key, text in names.items():
        ours, row = medians["herd"][key], f"| {text} | {medians['herd'][key]:.3g} |"
        for name in peers:
            theirs = medians[name][key]
            row += f" {theirs:.3g} | {(ours / theirs if key == 'tokens_per_s' else theirs / ours):.2f}× |"
        print(row)


if __name__ == "__main__":
    main()
