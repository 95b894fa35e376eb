"""Figures for Prometheus, in a registry of each server's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.routing import Match, Route
from starlette.types import Scope

from herd.engine import Completion

if TYPE_CHECKING:
    from herd.serve.registry import Model

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


def path_of(app: Starlette, scope: Scope) -> str:
    """The path of a request as routes have it; "other" where there is none, or strangers would make up labels."""
    here = (route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE)
    route = next(here, None)
    return "other" if route is None else route.path.replace(":path", "")


class Metrics:
    """What a server counts. `models` gives the loaded ones at the time of asking."""

    def __init__(self, models: Callable[[], Iterable[Model]]) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "herd_responses", "Responses by path and status.", ["path", "status"], registry=self._registry
        )
        self._streams = Counter(
            "herd_streams", "Streams that began, by path and how they ended.", ["path", "end"], registry=self._registry
        )
        self._time = Histogram(
            "herd_request_seconds", "From arrival to the end.", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self._tokens = Counter(
            "herd_tokens", "Tokens of prompts, of those the cached ones, and of answers.", ["model", "kind"],
            registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "herd_first_token_seconds", "From the queue to the first token.", ["model"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._gap = Histogram(
            "herd_token_seconds", "From each token of an answer to the next.", ["model"], buckets=_PER_TOKEN,
            registry=self._registry,
        )  # fmt: skip
        self._guesses = Counter(
            "herd_guessed_tokens", "Tokens that speculation guessed, and those that were right.", ["model", "kind"],
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Load(models))
        ProcessCollector(registry=self._registry)

    def response(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def stream(self, path: str, end: str) -> None:
        self._streams.labels(path, end).inc()

    def seconds(self, path: str, seconds: float) -> None:
        self._time.labels(path).observe(seconds)

    def answered(self, model: str, completions: Sequence[Completion], prompt_tokens: int) -> None:
        self._tokens.labels(model, "prompt").inc(prompt_tokens)
        for completion in completions:
            times, tokens = completion.timings, completion.usage.completion_tokens
            self._tokens.labels(model, "completion").inc(tokens)
            self._tokens.labels(model, "cached").inc(times.reused_tokens)
            self._first.labels(model).observe(times.queue_s + times.prefill_s)
            self._guesses.labels(model, "guessed").inc(times.drafted_tokens)
            self._guesses.labels(model, "right").inc(times.accepted_tokens)

    def gaps(self, model: str, seconds: Iterable[float]) -> None:
        """Times from tokens to the next ones of their answers; a model's thread may tell them."""
        histogram = self._gap.labels(model)
        for each in seconds:
            histogram.observe(each)

    def page(self) -> bytes:
        """All figures in Prometheus' text form."""
        return generate_latest(self._registry)


class _Load:
    """What is true at the moment of asking."""

    def __init__(self, models: Callable[[], Iterable[Model]]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("herd_running_requests", "Requests whose answers are generated.", labels=["model"])
        waiting = GaugeMetricFamily("herd_waiting_requests", "Requests that have no place yet.", labels=["model"])
        used = GaugeMetricFamily("herd_cache_pages_used", "Pages of the cache that answers have.", labels=["model"])
        pages = GaugeMetricFamily("herd_cache_pages", "Pages of the cache, at its largest.", labels=["model"])
        preemptions = CounterMetricFamily(
            "herd_preemptions", "Answers that gave up their place in the cache for a while.", labels=["model"]
        )
        for model in self._models():
            running.add_metric([model.name], model.driver.running)
            waiting.add_metric([model.name], model.driver.waiting)
            in_use, there = model.llm.backend.cache_pages
            used.add_metric([model.name], in_use)
            pages.add_metric([model.name], there)
            preemptions.add_metric([model.name], model.llm.scheduler.preemptions)
        return running, waiting, used, pages, preemptions
