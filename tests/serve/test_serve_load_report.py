"""`herd bench serve` as a program: its JSON, its records and tables, its search for the knee, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import pytest

from tests.serve.scripted_server import Request, bench, serving

SPREAD = {
    "type": "object",
    "required": ["n", "p50", "p90", "p99", "max", "at_least"],
    "additionalProperties": False,
    "properties": {"n": {"type": "integer"}, "at_least": {"type": "array"}}
    | {key: {"type": ["number", "null"]} for key in ("p50", "p90", "p99", "max")},
}
STAGE = {
    "type": "object",
    "properties": {key: SPREAD for key in ("ttft", "tpot", "gap", "e2e")}
    | {
        "load": {"type": "object", "required": ["rate", "clients"]},
        "seconds": {"type": "object", "required": ["due", "total"]},
        "requests": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 8},
        "errors": {"type": "array", "items": {"required": ["outcome", "status", "detail", "count"]}},
        "tokens": {"type": "object", "required": ["input", "cached", "output", "counted_by"]},
        "throughput": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
        "goodput": {"required": ["requests_per_second", "good", "share", "interval", "objectives"]},
        "client": {
            "required": ["late", "lag", "cpu_share", "out_of_files"],
            "properties": {"late": SPREAD, "lag": SPREAD, "cpu_share": {"type": "number", "minimum": 0}},
        },
        "interrupted": {"type": "boolean"},
    },
}
STAGE["required"] = list(STAGE["properties"])  # type: ignore[call-overload]
RESULT = {
    "type": "object",
    "required": ["url", "model", "local", "settings", "interrupted", "stages", "knee", "notes"],
    "properties": {
        "stages": {"type": "array", "items": STAGE, "minItems": 1},
        "notes": {"type": "array", "items": {"type": "string"}},
        "knee": {"type": ["object", "null"], "required": ["definition", "rate", "goodput", "share", "fails_at"]},
    },
}


def test_json_records_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request) -> None:
        if request.number == 3:
            await request.reply(429, {"error": {"message": "bu\x1b[2Jsy"}}, "Retry-After: 7")
        else:
            await request.stream(first=0.01, gap=0.01)

    records, prompts = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"messages": [{"role": "user", "content": "two"}], "id": 7}\n')
    options = ("--requests", 8, "--prompts", prompts, "--records", records)
    with serving(script) as server:
        assert bench(server.url, "--rates", "20,40", *options, "--json") == 0
        shown = capsys.readouterr()
        assert bench(server.url, "--rate", 30, *options[:2], "--slo", "e2e=30") == 0
        table = capsys.readouterr().out
        assert bench(server.url, "--rates", "30,50", *options[:2], "--slo", "e2e=30") == 0
        overview = capsys.readouterr().out
    result = json.loads(shown.out)
    jsonschema.validate(result, RESULT)
    assert [stage["load"]["rate"] for stage in result["stages"]] == [20, 40]
    assert result["knee"]["rate"] is None and result["knee"]["fails_at"] == 20  # one of eight was refused
    assert result["settings"]["requests"] == 8 and result["settings"]["prompts"] == str(prompts)
    assert {request.body["messages"][0]["content"] for request in server.requests[:17]} == {"one", "two"}

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["rate"] for row in rows] == [20.0] * 8 + [40.0] * 8
    ok = [row for row in rows[:8] if row["outcome"] == "ok"]
    assert max(row["events"][0] - row["due"] for row in ok) == pytest.approx(
        result["stages"][0]["ttft"]["max"], abs=1e-5
    )
    assert sum(row["good"] for row in rows[:8]) == result["stages"][0]["goodput"]["good"]

    assert "first token" in table and "each further token" in table and "e2e ≤ 30 s" in table and "8 of 8" in table
    assert "a p90 takes 29, a p99 takes 299" in table and "knee" not in table
    assert "30/s" in overview and "50/s" in overview and "knee: 50/s" in overview


def test_failures_are_shown_with_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request) -> None:
        code = (429, 500)[request.number % 2]
        await request.reply(code, {"error": {"message": "bu\x1b[2Jsy"}}, "Retry-After: 7")

    with serving(script) as server:
        assert bench(server.url, "--requests", 4, "--rate", 30, "--warmup", 0) == 4  # not a single answer
    shown = capsys.readouterr().out
    assert "2 × refused 429, 2 with Retry-After (bu␛[2Jsy)" in shown and "2 × http error 500 (bu␛[2Jsy)" in shown


def test_a_sweep_finds_what_the_server_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that has four places, in each of which a request stays for 30 ms or a little longer."""

    async def script(request: Request) -> None:
        if server.running > 4:
            await request.reply(429, {})
        else:
            await request.stream(first=0.03)

    with serving(script) as server:
        assert bench(server.url, "--sweep", "--rate", 20, "--requests", 40, "--slo", "ttft=5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    found = result["knee"]
    # Erlang's loss formula: 10 % find all places taken at 2.05 times their number over 0.03 s, so at 68 a second.
    assert found["rate"] <= 150 and found["rate"] < found["fails_at"] <= 1.11 * found["rate"]
    assert found["share"] >= 0.9 and len(result["stages"]) >= 4


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("load", [("--rate", "20"), ("--concurrency", "2")])
def test_ctrl_c_ends_early_and_reports(load: tuple[str, str]) -> None:
    came = threading.Semaphore(0)

    async def script(request: Request) -> None:
        came.release()
        await request.stream(first=0.0 if request.number < 4 else 60.0)

    with serving(script) as server:
        command = [sys.executable, "-m", "herd", "bench", "serve", server.url, *load, "--duration", "600", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for _ in range(6):
                assert came.acquire(timeout=60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = json.loads(out)
    jsonschema.validate(result, RESULT)
    stage = result["stages"][0]
    assert result["interrupted"] and stage["interrupted"] and stage["requests"]["unfinished"] >= 1
    assert stage["requests"]["ok"] <= 3 and stage["seconds"]["due"] < 600
    assert any("interrupted" in note for note in result["notes"])
