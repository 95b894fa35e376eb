"""What a load run saw, as figures: pure functions from records of requests to percentiles, throughput and goodput.

All times are seconds since the stage began. Latencies count from the moment at which a request was due, whatever kept
the client from sending it: a server that stalls cannot make its stall invisible by holding up the requests that would
have met it (coordinated omission; G. Tene, How NOT to Measure Latency, 2015).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from herd.evaluate.statistics import wilson

Outcome = Literal["ok", "refused", "http_error", "broken", "timeout", "connection", "unfinished"]
"""ok: a whole and well-formed stream. refused: 429 or 503. http_error: another status. broken: a stream that is damaged
or has no end. timeout: no end in time. connection: none could be made, or it closed before the answer began.
unfinished: Ctrl-C came first; counts nowhere."""

PERCENTS = (50, 90, 99)
CONFIDENCE = 0.95  # that a sample which shows a percentile has a value above it
REFUSALS = (429, 503)
HELD = 0.9  # of a stage's requests that meet the objectives, for its rate to count as held
_HALVES = 20  # requests from which a stage's halves are compared


@dataclass(slots=True)
class Record:
    """One request. `events` are the times of all events that brought text; `finished` is when finish_reason came,
    `ended` when [DONE] came or it was clear that none would."""

    index: int
    due: float
    started: float = 0.0
    connected: float | None = None
    ended: float = 0.0
    finished: float | None = None
    events: list[float] = field(default_factory=list)
    outcome: Outcome = "unfinished"
    detail: str = ""
    status: int | None = None
    retry_after: str | None = None
    finish_reason: str | None = None
    tokens_in: int | None = None
    cached_tokens: int | None = None
    usage_tokens: int | None = None

    @property
    def tokens_out(self) -> int:
        """As the server's usage says, or else the events that brought text."""
        return len(self.events) if self.usage_tokens is None else self.usage_tokens

    @property
    def late(self) -> float:
        return self.started - self.due

    @property
    def e2e(self) -> float:
        return self.ended - self.due

    @property
    def ttft(self) -> float | None:
        """Until the first text; None where none came."""
        return self.events[0] - self.due if self.events else None

    @property
    def tpot(self) -> float | None:
        """(end - first) / (tokens - 1), the mean time of a token after the first; None for fewer than two tokens."""
        if not self.events or self.finished is None or self.tokens_out < 2:
            return None
        return (self.finished - self.events[0]) / (self.tokens_out - 1)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.events, self.events[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Objectives:
    """Bounds in seconds that an answer must meet to be a good one; None: no bound."""

    ttft: float | None = 1.0
    tpot: float | None = 0.1
    e2e: float | None = None

    def met(self, record: Record) -> bool:
        """An answer without text is judged by its end; one of a single token has no time per further token."""
        if record.outcome != "ok":
            return False
        ttft = record.e2e if record.ttft is None else record.ttft
        measured = ((ttft, self.ttft), (record.tpot, self.tpot), (record.e2e, self.e2e))
        return all(bound is None or value is None or value <= bound for value, bound in measured)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of `n` values, None where so many cannot show them. Those named in `at_least` belong to requests that
    timed out: the figure is how long they had been waited for."""

    n: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None
    at_least: tuple[str, ...] = ()


def needed(percent: int) -> int:
    """Values that show a percentile p: the least n with 1 - pⁿ >= 95 %, so that the true percentile most likely lies
    below the largest of them: 5, 29 and 299 for the 50th, 90th and 99th."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percent / 100))


def distribution(values: Iterable[float], cut_short: Sequence[float] = ()) -> Distribution:
    """Percentiles by nearest rank: the smallest value that at least so many percent do not exceed.

    `cut_short` are waits that ended without the value. They rank above all values, since leaving them out would make a
    server look the faster the more answers it never gave.
    """
    ordered = sorted(values)
    n = len(ordered) + len(cut_short)
    if not n:
        return Distribution(0)
    shown: dict[str, float] = {}
    at_least = []
    ranks = {f"p{p}": -(-p * n // 100) for p in PERCENTS if n >= needed(p)} | {"max": n}
    for name, rank in ranks.items():
        if rank <= len(ordered):
            shown[name] = ordered[rank - 1]
        else:
            shown[name] = min(cut_short)
            at_least.append(name)
    return Distribution(n, **shown, at_least=tuple(at_least))


def summarise(records: Sequence[Record], objectives: Objectives, window: float, *, open_loop: bool) -> dict[str, Any]:
    """The figures of a stage, ready for JSON. `window`: seconds during which requests were due.

    goodput = requests that met the objectives / seconds; the seconds are the window in the open loop, so that goodput
    is the offered rate times the share of good answers, and the whole time in the closed one.
    """
    sent = [record for record in records if record.outcome != "unfinished"]
    answered = [record for record in sent if record.outcome == "ok"]
    waited = [record for record in sent if record.outcome == "timeout"]
    total = max([window, *(record.ended for record in records)])
    good = sum(map(objectives.met, sent))
    output = sum(record.tokens_out for record in answered)
    with_usage = sum(record.usage_tokens is not None for record in answered)
    outcomes = Counter(record.outcome for record in records)
    return {
        "seconds": {"due": window, "total": total},
        "requests": {"due": len(records), **{name: outcomes[name] for name in Outcome.__args__}},  # type: ignore[attr-defined]
        "errors": _errors(sent),
        "ttft": asdict(
            distribution(
                [record.ttft for record in (*answered, *waited) if record.ttft is not None],
                [record.e2e for record in waited if record.ttft is None],
            )
        ),
        "tpot": asdict(distribution(record.tpot for record in answered if record.tpot is not None)),
        "gap": asdict(distribution(gap for record in answered for gap in record.gaps)),
        "e2e": asdict(distribution((record.e2e for record in answered), [record.e2e for record in waited])),
        "without_text": sum(not record.events for record in answered),
        "ttft_halves": _halves(answered),
        "tokens": {
            "input": _total(record.tokens_in for record in answered),
            "cached": _total(record.cached_tokens for record in answered),
            "output": output,
            "counted_by": {"usage": with_usage, "events": len(answered) - with_usage},
        },
        "throughput": {
            "requests_per_second": _per(len(answered), total),
            "output_tokens_per_second": _per(output, total),
            "output_tokens_per_second_while_due": _per(_tokens_by(records, window), window),
        },
        "goodput": {
            "requests_per_second": _per(good, window if open_loop else total),
            "good": good,
            "share": good / len(sent) if sent else None,
            "interval": wilson(good, len(sent)) if sent else None,
            "objectives": asdict(objectives),
        },
    }  # fmt: skip


def _tokens_by(records: Iterable[Record], moment: float) -> float:
    """Output tokens that had arrived by then; where an event brings several tokens, each counts as its share."""
    return sum(
        record.tokens_out * sum(event <= moment for event in record.events) / len(record.events)
        for record in records
        if record.events
    )


def _errors(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What failed, alike together, the most frequent first."""
    failed = [record for record in records if record.outcome != "ok"]
    kinds = Counter((record.outcome, record.status, record.detail) for record in failed)
    told = Counter(
        (record.outcome, record.status, record.detail) for record in failed if record.retry_after is not None
    )
    return [
        {"outcome": kind[0], "status": kind[1], "detail": kind[2], "count": count, "with_retry_after": told[kind]}
        for kind, count in kinds.most_common()
    ]


def _halves(answered: Sequence[Record]) -> list[float] | None:
    """Median time to first text of the requests due first and of those due last: a queue that grows shows here."""
    times = [record.ttft for record in sorted(answered, key=lambda each: each.due) if record.ttft is not None]
    if len(times) < _HALVES:
        return None
    middle = len(times) // 2
    return [statistics.median(times[:middle]), statistics.median(times[middle:])]


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _per(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def as_row(record: Record, objectives: Objectives) -> dict[str, Any]:
    """A record as a line of JSON: what was seen, and the latencies that follow from it."""
    gaps = distribution(record.gaps)
    return {
        **{name: _rounded(value) for name, value in asdict(record).items()},
        **{name: _rounded(getattr(record, name)) for name in ("late", "ttft", "tpot", "e2e", "tokens_out")},
        "gap_p99": _rounded(gaps.p99),
        "gap_max": _rounded(gaps.max),
        "good": objectives.met(record),
    }


def _rounded(value: Any) -> Any:
    """To the microsecond."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value
