"""An honest load generator for any OpenAI-compatible server: `herd bench serve`.

Open loop: requests are due at times of a Poisson process, drawn before the run; a slow answer delays no request.
Closed loop: so many clients, each of which sends its next request when its last was answered; for saturation, since a
server that slows down slows such clients down too and hides how long others would have waited.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import math
import os
import random
import signal
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from herd.config import Config
from herd.errors import HerdError, ResourceError, UsageError
from herd.progress import status
from herd.serve.load.client import PATHS, Endpoint, Target, ask, get, locate, now
from herd.serve.load.figures import Distribution, Objectives, Record, distribution, summarise
from herd.serve.load.notes import knee, next_rate, notes
from herd.serve.load.prompts import Workload, read_prompts

_LEAD = 0.05  # seconds from the start of a stage's clock to its zero, so that the first request is not late
_TICK = 0.02  # seconds between two looks at how late the event loop is
_PAUSE = 0.1  # seconds that a client of the closed loop waits at least after a refusal
_MOST = 10_000_000  # requests of a stage


class LoadConfig(Config):
    """What is sent, how often, and what counts as good."""

    url: str = Field(description="The server, as http://HOST:PORT; /v1 may follow.")
    endpoint: Endpoint = Field(default="chat", description="chat or completions.")
    model: str | None = Field(default=None, description="Name of the model; None: the first of GET /v1/models.")
    rates: tuple[float, ...] = Field(default=(), description="Open loop: requests per second, a stage for each.")
    concurrency: tuple[int, ...] = Field(default=(), description="Closed loop: clients, a stage for each.")
    sweep: bool = Field(default=False, description="Find the highest rate that holds, beginning with the only one.")
    duration: float | None = Field(default=None, gt=0, le=86_400, description="Seconds during which requests are due.")
    requests: int | None = Field(default=None, ge=1, le=_MOST, description="Requests of a stage, instead.")
    warmup: int = Field(default=1, ge=0, le=10_000, description="Requests sent before, one after the other.")
    timeout: float = Field(default=120.0, gt=0, le=86_400, description="Seconds that an answer may take.")
    prompt_tokens: int = Field(default=128, ge=1, le=10_000_000, description="Words of a prompt, each one token.")
    shared_prefix: int = Field(default=0, ge=0, le=10_000_000, description="Words in front that all prompts share.")
    max_tokens: tuple[int, int] = Field(default=(128, 128), description="Of an answer: uniform from least to most.")
    prompts: Path | None = Field(default=None, description="JSON lines with the prompts to send instead.")
    extra: dict[str, Any] = Field(default={}, description="Further fields of every request; null removes one.")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Of arrivals, prompts and lengths.")
    ttft: float | None = Field(default=1.0, gt=0, description="Seconds to the first token of a good answer.")
    tpot: float | None = Field(default=0.1, gt=0, description="Mean seconds of each further one.")
    e2e: float | None = Field(default=None, gt=0, description="Seconds to the end of a good answer.")

    @model_validator(mode="after")
    def _consistent(self) -> LoadConfig:
        if bool(self.rates) == bool(self.concurrency):
            raise ValueError("give either rates or a concurrency")
        if any(not 0 < rate <= 100_000 for rate in self.rates):
            raise ValueError("a rate is above 0 and at most 100000 requests a second")
        if any(not 1 <= clients <= 10_000 for clients in self.concurrency):
            raise ValueError("a concurrency is from 1 to 10000 clients")
        if self.sweep and len(self.rates) != 1:
            raise ValueError("a sweep begins with one rate")
        if (self.duration is None) == (self.requests is None):
            raise ValueError("give either a duration or a number of requests")
        if self.duration is not None and max(self.rates, default=0.0) * self.duration > _MOST:
            raise ValueError(f"a stage has at most {_MOST} requests: a lower rate or a shorter duration")
        if self.extra.get("n") not in (None, 1):
            raise ValueError("each request is for one answer: n is 1")
        if not 1 <= self.max_tokens[0] <= self.max_tokens[1]:
            raise ValueError("max_tokens goes from at least 1 to no less than that")
        if self.prompts is not None and self.shared_prefix:
            raise ValueError("prompts of a file have no shared prefix")
        return self

    @property
    def objectives(self) -> Objectives:
        return Objectives(self.ttft, self.tpot, self.e2e)


@dataclass(frozen=True)
class Loaded:
    """A run's figures, ready for JSON, and its records: a list for each stage."""

    result: dict[str, Any]
    records: list[list[Record]]

    @property
    def answered(self) -> int:
        return sum(stage["requests"]["ok"] for stage in self.result["stages"])


@dataclass
class Stage:
    """A stage that runs: its records, and how well the client itself keeps up. `rate` None: the closed loop."""

    rate: float | None
    clients: int | None
    start: float = field(default_factory=lambda: now() + _LEAD)
    records: list[Record] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    cpu: float = field(default_factory=time.process_time)
    began: float = field(default_factory=now)
    ended: int = 0

    @property
    def name(self) -> str:
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g} requests/s"

    def progress(self, config: LoadConfig, last: float | None) -> str:
        """A line for people; `last`: when the last request is due, where that is known."""
        elapsed = max(now() - self.start, 0.0)
        if last is None and config.requests is not None and self.ended:
            last = elapsed * config.requests / self.ended
        left = "" if last is None else f", {last - elapsed:,.0f} s left" if elapsed < last else ", waiting for the rest"
        return f"{self.name}: {len(self.records):,} sent, {len(self.records) - self.ended:,} under way{left} …"

    def client(self) -> dict[str, Any]:
        """What the client itself may have done to the figures: seconds by which it sent too late and by which its event
        loop was late, and the share of a processor's time that it used."""
        late = distribution([record.late for record in self.records]) if self.rate is not None else Distribution(0)
        elapsed = now() - self.began
        return {
            "late": asdict(late),
            "lag": asdict(distribution(self.lags)),
            "cpu_share": (time.process_time() - self.cpu) / elapsed if elapsed else 0.0,
            "out_of_files": any(record.detail == os.strerror(errno.EMFILE) for record in self.records),
        }


def arrivals(rate: float, n: int, seed: int) -> list[float]:
    """Times of `n` arrivals of a Poisson process in n/rate seconds, so that exactly `rate` is offered.

    t_i = n/rate · S_i / S_(n+1), S_i the sum of i exponential gaps: given their number, the times of a Poisson process
    are those of independent uniform draws in order (Devroye, Non-Uniform Random Variate Generation, 1986, V.2). One
    seed gives the same pattern at every rate, so that two rates differ in as little else as possible.
    """
    chance = random.Random(f"{seed}/arrivals")
    *sums, last = itertools.accumulate(chance.expovariate(1.0) for _ in range(n + 1))
    return [n / rate * each / last for each in sums]


def run(config: LoadConfig, api_key: str | None = None) -> Loaded:
    """Load the server as `config` says. Ctrl-C ends early with what there is; a second one interrupts.

    Raises UsageError and ResourceError where the server is not there or rejects the very first request.
    """
    return asyncio.run(_run(config, api_key))


async def _run(config: LoadConfig, api_key: str | None) -> Loaded:
    prompts = [] if config.prompts is None else read_prompts(config.prompts, config.endpoint)
    target = await locate(config.url, api_key)
    model = config.model or await _first_model(target)
    workload = Workload(
        endpoint=config.endpoint,
        model=model,
        words=config.prompt_tokens,
        shared_words=config.shared_prefix,
        max_tokens=config.max_tokens,
        seed=config.seed,
        prompts=prompts,
        extra=config.extra,
    )
    generator = _Generator(target, workload, config)
    stages: list[dict[str, Any]] = []
    records: list[list[Record]] = []
    with generator.until_interrupted():
        try:
            await generator.warm_up()
            for rate, clients in _plan(config, stages):
                if generator.stop.done():
                    break
                figures, found = await generator.stage(rate, clients)
                stages.append(figures)
                records.append(found)
        finally:
            status("")
    result = {
        "url": target.url + PATHS[config.endpoint],
        "model": model,
        "local": target.local,
        "prompts_in_file": len(prompts) or None,
        "settings": config.model_dump(mode="json", exclude={"url", "endpoint", "model"}),
        "interrupted": generator.stop.done(),
        "stages": stages,
        "knee": knee(stages) if len(config.rates) > 1 or config.sweep else None,
    }
    return Loaded(result | {"notes": notes(result)}, records)


def _plan(config: LoadConfig, stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float | None, int | None]]:
    """Rate or clients of each stage; a sweep looks at those before."""
    if not config.sweep:
        yield from ((rate, None) for rate in config.rates)
        yield from ((None, clients) for clients in config.concurrency)
        return
    while (rate := next_rate(stages, config.rates[0])) is not None:
        yield rate, None


async def _first_model(target: Target) -> str:
    code, data, message = await get(target, "/models", timeout=30.0)
    if code != 200:
        raise _rejected(code, message, target.url + "/models")
    try:
        return str(data["data"][0]["id"])
    except (TypeError, LookupError):
        raise UsageError("the server does not say which models it has", value=message, fix="--model NAME") from None


def _rejected(code: int | None, message: str, url: str) -> HerdError:
    """A request that is answered with an error before anything is measured."""
    what = f"the server answers {code} ({message or 'without a word'})"
    if code in (401, 403):
        return UsageError(what, value=url, fix="--api-key KEY, or HERD_API_KEY in the environment")
    if code is not None and code < 500 and code != 429:
        fix = "look at --model, --endpoint and --extra, and whether the URL is right"
        if "context" in message.lower():  # all servers' word for what a prompt does not fit into
            fix = "lower --prompt-tokens, --shared-prefix or --max-tokens, or send shorter --prompts"
        return UsageError(what, value=url, fix=fix)
    return ResourceError(what, value=url, fix="wait until the server is ready")


class _Generator:
    """Sends numbered requests to one server until `stop` is done."""

    def __init__(self, target: Target, workload: Workload, config: LoadConfig) -> None:
        self._target = target
        self._workload = workload
        self._config = config
        self._numbers = itertools.count()
        self.stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """While the block runs, the first Ctrl-C only ends `stop`."""
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            if self.stop.done():
                raise KeyboardInterrupt
            self.stop.set_result(None)

        try:
            loop.add_signal_handler(signal.SIGINT, interrupted)
        except (NotImplementedError, ValueError, RuntimeError):  # Windows; or not the main thread
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def warm_up(self) -> None:
        """Requests that count nowhere; what they meet would fail every other one too."""
        for done in range(self._config.warmup):
            status(f"warming up: {done} of {self._config.warmup} …")
            number = next(self._numbers)
            record = Record(number, 0.0)
            sent = asyncio.create_task(self._ask(record, self._workload.body(number), now()))
            await self._all([sent])
            if self.stop.done():
                return
            if record.outcome in ("refused", "http_error"):
                raise _rejected(record.status, record.detail, self._target.url + PATHS[self._config.endpoint])
            if record.outcome != "ok":
                raise ResourceError(
                    f"the first request already fails ({record.outcome}: {record.detail})",
                    value=self._target.url,
                    fix="look at the server's log; --warmup 0 measures all the same",
                )

    async def stage(self, rate: float | None, clients: int | None) -> tuple[dict[str, Any], list[Record]]:
        """Run one stage to the end of its last answer."""
        config = self._config
        due, bodies, window = [], [], config.duration
        if rate is not None:
            n = config.requests or max(round(rate * (config.duration or 0.0)), 1)
            due, window = arrivals(rate, n, config.seed), n / rate
            bodies = [self._workload.body(next(self._numbers)) for _ in due]  # before the clock runs
        stage = Stage(rate, clients)
        watch = asyncio.create_task(self._watch(stage, window))
        try:
            if rate is not None:
                await self._open_loop(stage, due, bodies)
            else:
                await self._closed_loop(stage)
        finally:
            watch.cancel()
        client = stage.client()
        if window is None:
            window = max((record.ended for record in stage.records), default=0.0)
        if self.stop.done():
            window = max(min(window, now() - stage.start), 0.0)
        figures = summarise(stage.records, config.objectives, window, open_loop=rate is not None)
        load = {"rate": rate, "clients": clients}
        return {"load": load, "interrupted": self.stop.done(), **figures, "client": client}, stage.records

    async def _open_loop(self, stage: Stage, due: Sequence[float], bodies: Sequence[bytes]) -> None:
        tasks = []
        for moment, body in zip(due, bodies, strict=True):
            if await self._interrupted_until(stage.start + moment):
                break
            tasks.append(asyncio.create_task(self._send(stage, moment, body)))
        await self._all(tasks)

    async def _closed_loop(self, stage: Stage) -> None:
        config = self._config
        turns = iter(range(config.requests)) if config.requests is not None else itertools.count()

        async def client() -> None:
            await self._interrupted_until(stage.start)
            while not self.stop.done() and (config.duration is None or now() - stage.start < config.duration):
                if next(turns, None) is None:
                    return
                body = self._workload.body(next(self._numbers))
                record = await self._send(stage, now() - stage.start, body)
                if record.outcome != "ok":
                    await self._interrupted_until(now() + max(_PAUSE, _seconds(record.retry_after)))

        await self._all([asyncio.create_task(client()) for _ in range(stage.clients or 1)])

    async def _send(self, stage: Stage, due: float, body: bytes) -> Record:
        record = Record(len(stage.records), due)
        stage.records.append(record)
        await self._ask(record, body, stage.start)
        stage.ended += 1
        return record

    def _ask(self, record: Record, body: bytes, start: float) -> Coroutine[Any, Any, None]:
        return ask(self._target, PATHS[self._config.endpoint], body, record, start, self._config.timeout)

    async def _interrupted_until(self, moment: float) -> bool:
        """Sleep until a moment of the clock; True when Ctrl-C came first."""
        await asyncio.wait([self.stop], timeout=max(moment - now(), 0.0))
        return self.stop.done()

    async def _all(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Wait for all; after Ctrl-C for none."""
        together: asyncio.Future[list[Any]] = asyncio.gather(*tasks, return_exceptions=True)
        either: list[asyncio.Future[Any]] = [together, self.stop]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for outcome in await together:
            if isinstance(outcome, Exception):
                raise outcome

    async def _watch(self, stage: Stage, last: float | None) -> None:
        """Note how late the event loop is: by so much at most, answers too were seen late. And show the progress.

        Each look that a stall held up counts as one, as requests do: else a long stall would be but one of many looks.
        """
        for ticks in itertools.count():
            before = now()
            await asyncio.sleep(_TICK)
            lag = max(now() - before - _TICK, 0.0)
            stage.lags += [lag - missed * _TICK for missed in range(1 + int(lag / _TICK))]
            if ticks % 25 == 0:
                status(stage.progress(self._config, last))


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header that gives seconds; a date is as good as none."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return min(seconds, 60.0) if math.isfinite(seconds) else 0.0
