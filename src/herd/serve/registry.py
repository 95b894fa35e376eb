"""The models of a server: names fixed at the start, loaded when they are asked for, unloaded when memory runs short."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from herd import __version__
from herd.engine import LLM
from herd.engine.memory import in_words
from herd.errors import HerdError, OutOfMemory
from herd.serve.config import ServeConfig
from herd.serve.driver import Driver
from herd.serve.errors import ApiError
from herd.serve.pools import Daemon

T = TypeVar("T")
log = logging.getLogger("herd.serve")
_BACK_OFF = 30.0  # seconds in which a model that could not be loaded is not tried again
_PATIENCE = 5.0  # seconds in which a model that is in use may become one that can be unloaded


@dataclass(eq=False)
class Model:
    """A loaded model. `fingerprint`: equal ones give equal bits."""

    name: str
    llm: LLM
    driver: Driver
    fingerprint: str
    used: float = field(default_factory=time.monotonic)
    users: int = 0
    """Requests that have it, whether they are in its queue already or not."""

    @property
    def idle(self) -> bool:
        return self.users == 0 and self.driver.idle

    def close(self, why: BaseException) -> None:
        self.driver.stop(why)
        self.llm.close()


def log_failure(name: str, error: BaseException) -> None:
    """A model could not be loaded."""
    log.error("%s cannot be loaded: %s", name, error)


class Registry:
    """Names of models and where they are. Used on the event loop only; loading happens beside it."""

    def __init__(
        self, paths: Mapping[str, Path], config: ServeConfig, loading: Mapping[str, Any] | None = None
    ) -> None:
        """`loading`: keyword arguments of LLM for all models."""
        self.paths = dict(paths)
        self.created = int(time.time())
        self._config = config
        self._loading = dict(loading or {})
        self._beside = Daemon("herd-loading")
        self._models: dict[str, Model] = {}
        self._tasks: dict[str, asyncio.Task[Model]] = {}
        self._failed: dict[str, float] = {}  # when a model could not be loaded
        self.on_failure: Callable[[str, BaseException], None] = log_failure
        """Called with the name of a model that could not be loaded, and why."""
        self.on_gaps: Callable[[str, list[float]], None] = lambda name, seconds: None
        """Called with the name of a model and times between its tokens, on its thread."""
        self._turn = asyncio.Lock()  # one model is loaded at a time
        self._room = asyncio.Event()  # nobody waits for loaded ones to make way, else new requests of them wait
        self._room.set()
        self._gave_up = -math.inf  # when they did not make way in time
        self._has_begun = False  # the first model has been there
        self._drains = asyncio.Event()

    @property
    def draining(self) -> bool:
        """Nothing more is taken."""
        return self._drains.is_set()

    @property
    def loading(self) -> bool:
        """A model is being loaded, by a thread that cannot be stopped."""
        return self._beside.working

    @property
    def first(self) -> str:
        return next(iter(self.paths))

    @property
    def loaded(self) -> list[Model]:
        return list(self._models.values())

    def path_of(self, name: str) -> Path:
        """Where a model is; 404 for any name that is none of this server's."""
        if name not in self.paths:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; this server has {', '.join(self.paths)}",
                param="model",
                code="model_not_found",
            )
        return self.paths[name]

    async def get(self, name: str | None) -> Model:
        """A model, ready. The first one is loaded when the server starts, and refused until it is there (503); others
        are loaded for who asks first."""
        name = self.first if name is None else name
        self.path_of(name)
        await self._unless_draining(self._room.wait())
        model = self._models.get(name)
        if model is None:
            if name == self.first and not self._has_begun and name in self._tasks and not self._tasks[name].done():
                raise self.not_there(name)
            if self._recently_failed(name):
                raise self.not_there(name)
            try:
                model = await self._unless_draining(asyncio.shield(self.load(name)))
            except ApiError:
                raise
            except HerdError:
                raise self.not_there(name) from None
        if self._models.get(name) is not model:
            raise ApiError(503, "the model was unloaded again", code="unloaded", retry_after=1)
        model.used = time.monotonic()
        model.users += 1
        return model

    async def _unless_draining(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
        """The result of `work`; 503 where nothing more is taken, or was not meanwhile."""
        task, drains = asyncio.ensure_future(work), asyncio.ensure_future(self._drains.wait())
        try:
            await asyncio.wait({task, drains}, return_when=asyncio.FIRST_COMPLETED)
            if self.draining:
                raise _stopping()
            return task.result()
        finally:
            for each in (task, drains):
                each.cancel()
            await asyncio.gather(task, drains, return_exceptions=True)

    def not_there(self, name: str) -> ApiError:
        """Why a model does not answer; what went wrong with it is the log's to say, not a client's to know."""
        if name in self._failed:
            message = f"the model {name} cannot be loaded; the server's log says why"
            return ApiError(503, message, code="load_failed", retry_after=_BACK_OFF)
        return ApiError(503, "the model is being loaded", code="loading", retry_after=2)

    def _recently_failed(self, name: str) -> bool:
        return time.monotonic() - self._failed.get(name, -_BACK_OFF) < _BACK_OFF

    def load(self, name: str) -> asyncio.Task[Model]:
        """The task that loads a model, or has."""
        task = self._tasks.get(name)
        if task is None or (task.done() and name not in self._models):
            task = self._tasks[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._note(name, done))
        return task

    def _note(self, name: str, task: asyncio.Task[Model]) -> None:
        if task.cancelled() or isinstance(task.exception(), ApiError):
            return
        if (error := task.exception()) is None:
            self._failed.pop(name, None)
        else:
            self._failed[name] = time.monotonic()
            self.on_failure(name, error)

    async def _load(self, name: str) -> Model:
        path = self.paths[name]
        async with self._turn:
            llm = await self._open(path)
            try:
                fingerprint = await self._beside.run(partial(_fingerprint, path, llm, self._loading))
                if self.draining:
                    raise _stopping()
            except BaseException:
                llm.close()
                raise
            config = self._config
            driver = Driver(
                llm,
                max_queue=config.max_queue,
                max_running=config.max_running,
                max_wait=config.max_wait,
                deadline=config.deadline,
                share_beginnings=config.share_beginnings,
                name=name,
                on_gaps=partial(self.on_gaps, name),
            )
            await asyncio.to_thread(_settle)
            self._has_begun |= name == self.first
            model = self._models[name] = Model(name, llm, driver, fingerprint)
            most = in_words(llm.memory)
            log.info("loaded %s from %s, %d tokens of context, at most %s of memory", name, path, llm.context, most)
            return model

    async def _open(self, path: Path) -> LLM:
        """A model, in the memory that there is; where that is too little, idle ones make way."""
        limit = self._config.memory
        while True:
            left = None if limit is None else limit - sum(model.llm.memory for model in self.loaded)
            try:
                return await self._beside.run(partial(self._open_within, left, path))
            except OutOfMemory as error:
                if limit is not None and error.needed > limit:
                    value, fix = f"--memory {in_words(limit)}", f"raise --memory, or {error.fix}"
                    raise OutOfMemory(error.what, error.needed, value=value, fix=fix) from None
                if not self.loaded:
                    raise
            if not await self._unload_in_time():
                message = "other models are in use, and there is no memory for one more"
                raise ApiError(503, message, code="models_in_use", retry_after=_PATIENCE)

    def _open_within(self, left: int | None, path: Path) -> LLM:
        """A model in an even share of the limit, or in all that is left of it where that is too little."""
        if left is not None and self._config.memory is not None:
            with contextlib.suppress(OutOfMemory):
                return LLM(path, memory=min(left, self._config.memory // len(self.paths)), **self._loading)
        return LLM(path, memory=left, **self._loading)

    async def _unload_in_time(self) -> bool:
        """Unload an idle model, waiting for one a while; False when none became idle.

        New requests wait meanwhile, as a model that is asked for all the time would never be idle. But where that was
        in vain, as answers are too long, they do not wait again for the same while, or nothing would go on any more.
        """
        end = time.monotonic() + _PATIENCE
        if time.monotonic() - self._gave_up > _PATIENCE:
            self._room.clear()
        try:
            while not await self._unload_one():
                if time.monotonic() > end:
                    self._gave_up = time.monotonic()
                    return False
                await asyncio.sleep(0.02)
            return True
        finally:
            self._room.set()

    async def _unload_one(self) -> bool:
        """Unload the idle model that was used longest ago; False when there is none."""
        idle = [model for model in self.loaded if model.idle]
        if not idle:
            return False
        model = min(idle, key=lambda model: model.used)
        del self._models[model.name]
        del self._tasks[model.name]
        await asyncio.to_thread(model.close, ApiError(503, "the model is unloaded", code="unloaded", retry_after=1))
        log.info("unloaded %s", model.name)
        return True

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait for what runs, then end it."""
        self._drains.set()
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(not model.idle for model in self.loaded):
            await asyncio.sleep(0.02)
        why = ApiError(503, "the server stops", code="stopped")
        while self._models:  # nobody meets one that is closed
            await asyncio.to_thread(self._models.popitem()[1].close, why)


def _stopping() -> ApiError:
    return ApiError(503, "the server is about to stop", code="draining", retry_after=5)


def _settle() -> None:
    """Objects that are there now stay: looking through them again and again stops everybody for 50 ms."""
    gc.unfreeze()  # models that were unloaded since lie in reference cycles, and would stay for ever
    gc.collect()
    gc.freeze()


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    kinds = {".safetensors", ".gguf", ".pth", ".json", ".model"}
    return sorted(file for file in path.rglob("*") if file.suffix in kinds and file.is_file())


def _fingerprint(path: Path, llm: LLM, loading: Mapping[str, Any]) -> str:
    """A hash of all that decides about the bits of an answer: files, number types, kernels."""
    total = hashlib.sha256()
    for file in _files_of(path):
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    kind = (llm.backend.identity, __version__, loading.get("quant"), loading.get("kv"))
    total.update(repr(kind).encode())
    return f"fp_{total.hexdigest()[:20]}"
