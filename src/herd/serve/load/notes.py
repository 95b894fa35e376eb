"""What a load run's figures mean: where the knee lies, which rate to try next, and what a reader must not overlook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from herd.serve.load.figures import HELD, PERCENTS, needed

Figures = Mapping[str, Any]

KNEE = (
    f"the highest rate at which at least {HELD:.0%} of the requests that were due met the objectives, "
    "as they did at every lower rate that was measured"
)
PRECISION = 1.1  # a sweep ends when the rate that fails is at most so many times the one that holds
_HIGHEST, _LOWEST = 1e5, 1e-3  # requests/s that a sweep does not go beyond
_TOO_LATE = 0.02  # seconds of the client's own that make its figures doubtful
_TOO_BUSY = 0.8  # of a processor's time, of which a Python process has one
_GROWING = 1.5  # times the first half's time to first token: the queue was still growing
_NOTICEABLE = 0.05  # seconds
_FEW = 100  # requests, of which 90 % are known to 6 points either way
_SHORT = 0.5  # of the tokens asked for
_CACHED = 0.05  # of the prompt tokens that are not shared by intent


def held(stage: Figures) -> bool:
    """Whether enough of a stage's requests met the objectives."""
    share = stage["goodput"]["share"]
    return share is not None and bool(share >= HELD)


def knee(stages: Sequence[Figures]) -> dict[str, Any]:
    """Where the goodput leaves the offered rate, which it equals as long as every answer is good. `rate` None: no rate
    held; `fails_at` None: none failed. `client_limited`: what failed there may have been the client."""
    whole = [stage for stage in stages if not stage["interrupted"]]
    failing = min((s for s in whole if not held(s)), key=lambda stage: stage["load"]["rate"], default=None)
    fails_at = None if failing is None else failing["load"]["rate"]
    below = [stage for stage in whole if held(stage) and (fails_at is None or stage["load"]["rate"] < fails_at)]
    best = max(below, key=lambda stage: stage["load"]["rate"], default=None)
    return {
        "definition": KNEE,
        "rate": None if best is None else best["load"]["rate"],
        "goodput": None if best is None else best["goodput"]["requests_per_second"],
        "share": None if best is None else best["goodput"]["share"],
        "fails_at": fails_at,
        "client_limited": failing is not None and bool(bottlenecks(failing["client"])),
    }


def next_rate(stages: Sequence[Figures], first: float) -> float | None:
    """Which rate a sweep tries after these: twice as much while it holds, half as much while none does, then the
    geometric middle between the highest that holds and the lowest that fails. None: they are close enough."""
    if not stages:
        return first
    failing = min((stage["load"]["rate"] for stage in stages if not held(stage)), default=math.inf)
    holding = max((rate for s in stages if held(s) and (rate := s["load"]["rate"]) < failing), default=0.0)
    if failing == math.inf:
        return None if holding * 2 > _HIGHEST else holding * 2
    if not holding:
        return None if failing / 2 < _LOWEST else failing / 2
    return float(f"{math.sqrt(holding * failing):.3g}") if failing / holding > PRECISION else None


def bottlenecks(client: Figures) -> list[str]:
    """How the client itself was the limit; empty where it was not."""
    found = []
    for key, what in (("late", "sent requests"), ("lag", "looked at answers")):
        percentile, seconds = _furthest(client[key])
        if seconds > _TOO_LATE:
            found.append(f"{what} {1000 * seconds:.0f} ms too late ({percentile})")
    if client["cpu_share"] > _TOO_BUSY:
        found.append(f"used {client['cpu_share']:.0%} of a processor, of which it can use one")
    if client["out_of_files"]:
        found.append("had too few open files (`ulimit -n` raises them)")
    return found


def _furthest(spread: Figures) -> tuple[str, float]:
    """The highest percentile that a sample shows, or else its maximum; 0 without values."""
    return next(((key, spread[key]) for key in ("p99", "p90", "max") if spread[key] is not None), ("max", 0.0))


def notes(result: Figures) -> list[str]:
    """What a reader must know to trust the figures or not."""
    found = []
    for stage in result["stages"]:
        where = f"{name(stage['load'])}: " if len(result["stages"]) > 1 else ""
        found += [where + note for note in _of_stage(stage, result["settings"])]
    if result["knee"] is not None and (few := min((s["requests"]["due"] for s in result["stages"]), default=0)) < _FEW:
        found.append(f"stages of as few as {few} requests place the knee only roughly: a longer --duration helps")
    fewest = min((stage["e2e"]["n"] for stage in result["stages"] if stage["e2e"]["n"]), default=math.inf)
    if missing := [f"p{percent} takes {needed(percent)}" for percent in PERCENTS if fewest < needed(percent)]:
        found.append(f"a percentile that so few answers cannot show is left out: a {', a '.join(missing)}")
    if result["local"]:
        found.append("client and server share this machine's processors")
    if any(stage["load"]["clients"] for stage in result["stages"]):
        found.append("clients that wait for an answer before they ask again hide queueing: --rate shows it")
    if any(stage["tokens"]["counted_by"]["events"] for stage in result["stages"]):
        found.append("the server sent no usage: events that brought text were counted as tokens")
    if result["prompts_in_file"] and any(s["requests"]["due"] > result["prompts_in_file"] for s in result["stages"]):
        found.append(f"the {result['prompts_in_file']} prompts of the file were repeated: a server may remember them")
    return found


def name(load: Figures) -> str:
    """A stage in words."""
    if load["rate"] is None:
        return f"{load['clients']} client{'s' if load['clients'] != 1 else ''}"
    return f"{load['rate']:g}/s"


def _of_stage(stage: Figures, settings: Figures) -> Iterator[str]:
    requests, tokens = stage["requests"], stage["tokens"]
    if limits := bottlenecks(stage["client"]):
        yield f"the client was a bottleneck, and the server may be better than these figures: it {', '.join(limits)}"
    if stage["interrupted"]:
        yield f"interrupted: {requests['unfinished']} requests had no answer yet and count nowhere"
    if requests["timeout"]:
        yield f"{requests['timeout']} answers timed out: they rank above all others, and figures with > are theirs"
    if stage["without_text"]:
        yield f"{stage['without_text']} answers had no text, so no first token"
    halves = stage["ttft_halves"]
    if halves and halves[1] > _GROWING * halves[0] and halves[1] - halves[0] > _NOTICEABLE:
        yield (
            f"the queue was still growing (time to first token {halves[0]:.3g} s in the first half, "
            f"{halves[1]:.3g} s in the second): a longer run would look worse"
        )
    asked = _asked(settings) * requests["ok"]
    if asked and tokens["output"] < _SHORT * asked:
        yield (
            f"answers had {tokens['output'] / requests['ok']:.0f} tokens on average of "
            f"{asked / requests['ok']:.0f} asked for: the model ended early; many servers take "
            "--extra '{\"ignore_eos\": true}'"
        )
    if tokens["cached"] and tokens["input"] and not settings["shared_prefix"]:
        share = tokens["cached"] / tokens["input"]
        if share > _CACHED:
            yield f"{share:.0%} of the prompts came from the server's cache; another --seed makes new ones"


def _asked(settings: Figures) -> float:
    """Tokens that an answer may have on average; 0 where `extra` leaves that to the server."""
    extra = settings.get("extra", {})
    limits = [extra[name] for name in ("max_tokens", "max_completion_tokens") if name in extra]
    if not limits:
        return float(sum(settings["max_tokens"])) / 2
    return min((float(limit) for limit in limits if isinstance(limit, int | float)), default=0.0)
