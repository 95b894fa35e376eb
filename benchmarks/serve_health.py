"""How long `herd serve` takes to say that it lives, beside the requests that cost it most.

    python benchmarks/serve_health.py [MODEL] [--seconds 3] [--workers 4] [--kinds WORD …] [--json]

A server of its own, four clients that send one kind of request as fast as they are answered, and a process that asks
/health every 10 ms on one connection. Requests are of the largest sizes that are taken, or just above; most are
refused, which must not take long either. Without MODEL one with random weights is made, whose context of 512 tokens
most of the texts exceed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_vs_llamacpp import free_port, serving
from shapes import SHAPES, weights

from herd import checkpoint, tokenizer

BODY = (8 << 20) - 64  # bytes: the largest body, less what stands around the lists below
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
TURN = {"role": "user", "content": "x"}


def listed(before: str, element: str, count: int, after: str) -> bytes:
    """A body with a list of equal elements."""
    return f"{before}[{','.join([element] * count)}]{after}".encode()


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def kinds() -> dict[str, tuple[str, bytes]]:
    """Path and body of each kind of request."""
    turns, turn = '{"max_tokens": 1, "messages": ', json.dumps(TURN)
    properties = {str(i): {"type": "string"} for i in range(60)}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object",
              "properties": properties}}} for i in range(128)]  # fmt: skip
    schema = {"type": "object", "properties": {str(i): {"type": "string"} for i in range(9000)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    def chat(**more: Any) -> bytes:
        return body(**{"messages": [TURN], "max_tokens": 1, **more})

    return {
        "a quarter of a million ids": (TEXT, listed('{"prompt": ', "0", 1 << 18, "}")),
        "four million ids": (TEXT, listed('{"prompt": ', "0", BODY // 2, "}")),
        "as many fractions": (TEXT, listed('{"prompt": ', "1.5e7", 1 << 18, "}")),
        "49,000 lists": (TEXT, listed('{"prompt": ', "[]", 49_000, "}")),
        "2.8 million lists": (TEXT, listed('{"prompt": ', "[]", BODY // 3, "}")),
        "49,000 objects": (CHAT, listed(turns, "{}", 49_000, "}")),
        "49,000 names": (TEXT, body(**{str(i): 0 for i in range(49_000)})),
        "4,096 messages": (CHAT, listed(turns, turn, 4096, "}")),
        "4,096 messages, Anthropic": (MESSAGES, listed(turns, turn, 4096, "}")),
        "1,000 items": ("/v1/responses", listed('{"input": ', turn, 1000, "}")),
        "a text of 8 MiB": (TEXT, body(prompt="ab " * (BODY // 3))),
        "a word of 1 MiB": ("/tokenize", body(content="a" * (1 << 20))),
        "a word of 64 KiB, in pieces": ("/tokenize", body(content="a" * (1 << 16), with_pieces=True)),
        "ids of a quarter of a million tokens": ("/detokenize", listed('{"tokens": ', "65", 1 << 18, "}")),
        "a schema of 300 KB": (CHAT, chat(response_format=form)),
        "128 functions, strict": (CHAT, chat(tools=tools, tool_choice="required")),
        "a regular expression of 10^6 states": (
            TEXT, body(prompt="x", response_format={"type": "regex", "grammar": "(x{1,1000}){1,1000}"})
        ),
        "64 prompts scored, 20 others a token": (
            TEXT, body(prompt=[list(range(20, 500))] * 64, echo=True, logprobs=20, max_tokens=0)
        ),
        "16 answers, 20 others a token": (CHAT, chat(n=16, max_tokens=200, logprobs=True, top_logprobs=20)),
        "the same as streams": (CHAT, chat(n=16, max_tokens=200, logprobs=True, top_logprobs=20, stream=True)),
        "256 embeddings": ("/v1/embeddings", body(input=["x " * 240] * 256)),
    }  # fmt: skip


def small_model(folder: Path) -> Path:
    """Random weights, a vocabulary of 600, a context of 512 tokens."""
    text = Path(statistics.__file__).read_text()
    small = tokenizer.train([text], 600)
    config = replace(
        SHAPES["1b"], n_layers=2, dim=64, ffn_dim=128, n_heads=4, n_kv_heads=2, head_dim=16,
        vocab_size=small.vocab_size, context_length=512,
    )  # fmt: skip
    path = folder / "small.gguf"
    checkpoint.save(path, config, weights(config), format="gguf", dtype="q8_0", tokenizer=small, label="small")
    return path


def watch(port: int) -> None:
    """Ask /health until something comes on standard input, then print how long each took."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    took = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        start = time.perf_counter()
        client.request("GET", "/health")
        response = client.getresponse()
        response.read()
        took.append(time.perf_counter() - start if response.status == 200 else float("inf"))
    print(json.dumps(took))


def attack(port: int, path: str, body: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """Send one kind of request for a while."""
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    watcher.stdout.readline()
    statuses: Counter[int] = Counter()
    end = time.monotonic() + options.seconds

    def work() -> None:
        while time.monotonic() < end:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            client.request("POST", path, body, {"content-type": "application/json"})
            response = client.getresponse()
            response.read()
            statuses[response.status] += 1
            client.close()

    workers = [threading.Thread(target=work) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = sorted(json.loads(watcher.communicate("end\n")[0]))
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(statuses),
        "median_ms": 1e3 * statistics.median(took),
        "p99_ms": 1e3 * took[-max(1, len(took) // 100)],
        "max_ms": 1e3 * took[-1],
    }


def main() -> None:
    """Measure one kind after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", metavar="WORD", help="only those whose name has one of these in it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch is not None:
        watch(options.watch)
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or small_model(Path(folder))
        port = free_port()
        with serving([sys.executable, "-m", "herd", "serve", f"model={model}"], "/ready", port):
            for name, (path, body) in kinds().items():
                if not options.kinds or any(word in name for word in options.kinds):
                    found[name] = attack(port, path, body, options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("| beside | answered | /health: median | 99 % | largest, ms |\n|---|---|---|---|---|")
    for name, row in found.items():
        answered = ", ".join(f"{count} × {status}" for status, count in sorted(row["statuses"].items()))
        print(f"| {name} | {answered} | {row['median_ms']:.1f} | {row['p99_ms']:.0f} | {row['max_ms']:.0f} |")
    print(f"\nThe slowest of all: {max(row['max_ms'] for row in found.values()):.0f} ms")


if __name__ == "__main__":
    main()
