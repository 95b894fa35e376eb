"""The arithmetic of `herd bench serve` on synthetic records, against definitions computed the long way."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.serve.load.figures import Objectives, Record, as_row, distribution, needed, summarise
from herd.serve.load.generator import arrivals
from herd.serve.load.notes import bottlenecks, knee, next_rate, notes

NO_BOUNDS = Objectives(None, None, None)
TIMES = st.lists(st.floats(0, 1e4), min_size=1, max_size=700)


@given(TIMES, st.integers(0, 30))
def test_percentiles_are_the_nearest_ranks(values: list[float], cut_short: int) -> None:
    found = distribution(values, [1e5] * cut_short)
    everything = np.array(values + [1e5] * cut_short)
    assert found.n == len(everything) and found.max == everything.max()
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        # With probability pⁿ every one of n values lies below the percentile: then they do not show it.
        if (percent / 100) ** len(everything) > 0.05:
            assert value is None
        else:
            assert value == np.percentile(everything, percent, method="inverted_cdf")
            assert (f"p{percent}" in found.at_least) == (value == 1e5)


def test_how_many_values_show_a_percentile() -> None:
    assert [needed(percent) for percent in (50, 90, 99)] == [5, 29, 299]
    assert distribution([1.0] * 298).p99 is None and distribution([1.0] * 299).p99 == 1.0
    nothing = distribution([])
    assert (nothing.n, nothing.p50, nothing.max) == (0, None, None)


def answer(index: int, due: float, first: float, gap: float, tokens: int, **more: Any) -> Record:
    """A good answer whose first token comes `first` after it was due and each further one `gap` later."""
    events = [due + first + i * gap for i in range(tokens)]
    return Record(
        index,
        due,
        started=due,
        events=events,
        finished=events[-1],
        ended=events[-1] + 0.001,
        outcome="ok",
        status=200,
        **more,
    )


def test_latencies_of_one_answer() -> None:
    record = answer(0, due=2.0, first=0.5, gap=0.25, tokens=5)
    record.started = 2.125  # the client was late: that is part of what the user waits for
    assert (record.ttft, record.tpot, record.e2e) == (0.5, 0.25, pytest.approx(1.501))
    assert record.late == 0.125 and record.gaps == [0.25] * 4
    record.usage_tokens = 11  # an event may bring several tokens
    assert record.tpot == pytest.approx(1.0 / 10)
    single = answer(0, due=0.0, first=0.5, gap=0.0, tokens=1)
    assert single.tpot is None and single.ttft == 0.5
    silent = Record(0, 0.0, ended=0.75, finished=0.75, outcome="ok")
    assert silent.ttft is None and silent.tpot is None
    assert Objectives(ttft=0.8).met(silent) and not Objectives(ttft=0.7).met(silent)


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        (Objectives(ttft=0.5, tpot=0.25), True),
        (Objectives(ttft=0.49, tpot=0.25), False),
        (Objectives(ttft=0.5, tpot=0.24), False),
        (Objectives(ttft=None, tpot=None, e2e=1.4), False),
        (Objectives(ttft=None, tpot=None, e2e=1.6), True),
    ],
)
def test_objectives_are_bounds_that_must_all_hold(objectives: Objectives, good: bool) -> None:
    record = answer(0, due=2.0, first=0.5, gap=0.25, tokens=5)
    assert objectives.met(record) is good
    record.outcome = "broken"
    assert not objectives.met(record)


def workload(seed: int) -> list[Record]:
    """A stage of everything that can happen."""
    chance, records, due = random.Random(seed), [], 0.0
    for index in range(400):
        due += chance.expovariate(10)
        kind = chance.random()
        if kind < 0.7:
            usage = chance.choice([None, 40])
            record = answer(index, due, chance.uniform(0.1, 2), chance.uniform(0.01, 0.2), chance.randint(1, 20))
            record.usage_tokens, record.tokens_in = usage, 7
            record.cached_tokens = 3 if index % 2 else None
        elif kind < 0.8:
            record = Record(index, due, due, ended=due + 0.01, outcome="refused", status=429, detail="busy")
            record.retry_after = chance.choice([None, "1"])
        elif kind < 0.9:
            record = Record(index, due, due, ended=due + 5, outcome="timeout", status=200)
            record.events = [due + 1.0] if chance.random() < 0.5 else []
        else:
            record = Record(index, due, due, ended=due + 0.5, outcome="broken", status=200, events=[due + 0.4])
        records.append(record)
    return records


@pytest.mark.parametrize("open_loop", [True, False])
def test_a_stage_is_what_its_rows_say(open_loop: bool) -> None:
    objectives = Objectives(ttft=1.0, tpot=0.1)
    records = workload(seed=1)
    window = records[-1].due
    figures = summarise(records, objectives, window, open_loop=open_loop)
    rows = [as_row(record, objectives) for record in records]
    ok = [row for row in rows if row["outcome"] == "ok"]
    slow = [row for row in rows if row["outcome"] == "timeout"]

    firsts = sorted(row["events"][0] - row["due"] for row in ok + slow if row["events"])
    firsts += [math.inf] * sum(not row["events"] for row in slow)
    expected = {p: firsts[math.ceil(len(firsts) * p / 100) - 1] for p in (50, 90)}
    assert figures["ttft"]["n"] == len(firsts)
    assert figures["ttft"]["p50"] == pytest.approx(expected[50], abs=1e-5)
    assert figures["ttft"]["p90"] == pytest.approx(expected[90], abs=1e-5)
    assert expected[90] < math.inf and figures["ttft"]["max"] == pytest.approx(5.0)
    assert "max" in figures["ttft"]["at_least"]

    tokens = [row["usage_tokens"] or len(row["events"]) for row in ok]
    tpots = [(row["finished"] - row["events"][0]) / (n - 1) for row, n in zip(ok, tokens, strict=True) if n > 1]
    assert figures["tpot"]["n"] == len(tpots) and figures["tpot"]["max"] == pytest.approx(max(tpots), abs=1e-4)
    gaps = sorted(b - a for row in ok for a, b in zip(row["events"], row["events"][1:], strict=False))
    assert figures["gap"]["n"] == len(gaps)
    assert figures["gap"]["p99"] == pytest.approx(gaps[math.ceil(0.99 * len(gaps)) - 1], abs=1e-5)
    assert figures["e2e"]["n"] == len(ok) + len(slow)

    total = max(row["ended"] for row in rows)
    good = sum(row["ttft"] <= 1.0 and (row["tpot"] is None or row["tpot"] <= 0.1) for row in ok)
    assert figures["goodput"]["good"] == good == sum(row["good"] for row in rows)
    assert figures["goodput"]["requests_per_second"] == pytest.approx(good / (window if open_loop else total))
    assert figures["goodput"]["share"] == good / len(rows)
    assert figures["goodput"]["interval"][0] < good / len(rows) < figures["goodput"]["interval"][1]
    assert figures["throughput"]["requests_per_second"] == pytest.approx(len(ok) / total)
    assert figures["throughput"]["output_tokens_per_second"] == pytest.approx(sum(tokens) / total)
    assert figures["tokens"]["output"] == sum(tokens) and figures["tokens"]["input"] == 7 * len(ok)
    assert figures["tokens"]["cached"] == 3 * sum(row["index"] % 2 for row in ok)
    assert figures["tokens"]["counted_by"]["usage"] == sum(row["usage_tokens"] is not None for row in ok)

    counted = {name: sum(row["outcome"] == name for row in rows) for name in figures["requests"] if name != "due"}
    assert figures["requests"] == {"due": 400, **counted}
    refused = next(error for error in figures["errors"] if error["outcome"] == "refused")
    assert refused["count"] == counted["refused"]
    assert refused["with_retry_after"] == sum(row["retry_after"] is not None for row in rows)


def test_tokens_while_due_leave_out_the_tail() -> None:
    records = [answer(0, 0.0, first=1.0, gap=1.0, tokens=10, usage_tokens=20)]
    figures = summarise(records, NO_BOUNDS, 5.0, open_loop=False)
    assert figures["throughput"]["output_tokens_per_second_while_due"] == pytest.approx(2 * 5 / 5.0)
    assert figures["throughput"]["output_tokens_per_second"] == pytest.approx(20 / 10.001)


def test_what_ctrl_c_cut_off_counts_nowhere() -> None:
    records = [answer(0, 0.0, 0.1, 0.1, 3), Record(1, 0.5, 0.5, ended=0.7)]
    figures = summarise(records, NO_BOUNDS, 1.0, open_loop=True)
    assert figures["requests"]["unfinished"] == 1 and figures["goodput"]["share"] == 1.0
    assert figures["errors"] == [] and figures["e2e"]["n"] == 1


def test_a_stage_without_requests_has_no_figures() -> None:
    figures = summarise([], NO_BOUNDS, 0.0, open_loop=True)
    assert figures["goodput"]["share"] is None and figures["throughput"]["requests_per_second"] is None


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(arrivals(4.0, 20_000, seed=3))
    assert (np.diff(times) > 0).all() and times[0] > 0 and times[-1] < 5000
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.25, rel=0.01) and gaps.std() == pytest.approx(0.25, rel=0.03)
    # The largest distance between the gaps' distribution and 1 - exp(-4 t), against its 99.9 % bound of 1.95/sqrt(n).
    expected = 1 - np.exp(-4 * np.sort(gaps))
    assert np.abs(np.arange(1, 20_001) / 20_000 - expected).max() < 1.95 / math.sqrt(20_000)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03  # no gap knows the one before
    counts = np.histogram(times, bins=5000, range=(0, 5000))[0]
    assert counts.mean() == 4 and counts.var() == pytest.approx(4, rel=0.1)  # as many as a Poisson number has


def test_arrivals_of_two_rates_differ_in_scale_only() -> None:
    slow, fast = (arrivals(rate, 50, seed=5) for rate in (1.0, 8.0))
    assert slow == pytest.approx([8 * moment for moment in fast])
    assert arrivals(1.0, 50, seed=6) != slow and 0 < arrivals(2.0, 1, seed=0)[0] < 0.5


def stage(rate: float, share: float | None, client: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What the search for the knee reads of a stage."""
    goodput = {"share": share, "requests_per_second": None if share is None else rate * share}
    quiet = {"late": {"p99": None, "p90": None, "max": None}, "cpu_share": 0.1, "out_of_files": False}
    quiet["lag"] = quiet["late"]
    load = {"rate": rate, "clients": None}
    return {"load": load, "goodput": goodput, "interrupted": False, "client": client or quiet, **more}


@given(st.floats(0.05, 5000), st.floats(0.1, 100))
def test_a_sweep_closes_in_on_the_capacity(capacity: float, first: float) -> None:
    stages: list[dict[str, Any]] = []
    while (rate := next_rate(stages, first)) is not None:
        assert rate not in [each["load"]["rate"] for each in stages]
        stages.append(stage(rate, 1.0 if rate <= capacity else 0.5))
    found = knee(stages)
    assert found["rate"] <= capacity < found["fails_at"] <= 1.11 * found["rate"]
    assert len(stages) < 6 + abs(math.log2(capacity / first))


def test_the_knee_lies_below_every_failing_rate() -> None:
    noisy = [stage(1, 1.0), stage(2, 0.95), stage(4, 0.89), stage(8, 0.97)]
    found = knee(noisy)
    assert (found["rate"], found["goodput"], found["fails_at"]) == (2, 1.9, 4)
    assert knee([stage(1, 0.9)])["rate"] == 1 and knee([stage(1, 0.9)])["fails_at"] is None
    assert knee([stage(1, 0.5), stage(2, None)])["rate"] is None
    assert knee([stage(1, 1.0), stage(2, 1.0) | {"interrupted": True}])["rate"] == 1
    assert knee([])["rate"] is None


def test_a_client_that_is_the_limit_is_told() -> None:
    spread = {"p99": None, "p90": 0.03, "max": 0.5}
    busy = {"late": spread, "lag": dict.fromkeys(spread), "cpu_share": 0.95, "out_of_files": True}
    assert not knee([stage(8, 1.0, busy), stage(16, 0.5)])["client_limited"]
    assert knee([stage(8, 1.0), stage(16, 0.5, busy)])["client_limited"]
    found = bottlenecks(busy)
    assert len(found) == 3 and "30 ms too late (p90)" in found[0] and "95%" in found[1] and "ulimit" in found[2]
    assert bottlenecks(stage(1, 1.0)["client"]) == []


def test_notes_say_what_a_reader_could_overlook() -> None:
    records = [answer(i, i / 10, 0.01 * i, 0.01, 4, tokens_in=100, cached_tokens=50) for i in range(40)]
    records.append(Record(40, 4.0, 4.0, ended=9.0, outcome="timeout"))
    figures = summarise(records, NO_BOUNDS, 4.1, open_loop=True)
    client = stage(1, 1.0)["client"] | {"cpu_share": 0.9}
    result = {
        "stages": [{"load": {"rate": 10.0, "clients": None}, "interrupted": False, **figures, "client": client}],
        "settings": {"max_tokens": [100, 200], "shared_prefix": 0},
        "knee": {},
        "local": True,
        "prompts_in_file": 10,
    }
    found = "\n".join(notes(result))
    for words in (
        "the client was a bottleneck",
        "as few as 41 requests",
        "left out: a p99 takes 299",
        "1 answers timed out",
        "the queue was still growing",
        "4 tokens on average of 150",
        "50% of the prompts came from the server's cache",
        "share this machine's processors",
        "no usage",
        "10 prompts of the file were repeated",
    ):
        assert words in found, words
