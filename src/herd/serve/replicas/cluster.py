"""The processes of the replicas: a cluster of Ray's, of this machine or one that is there, and a deployment for each.

Each replica is a Ray Serve application of its own, with one copy, so that the front holds a handle to each and knows
how much every one has to do: all requests pass there. Ray Serve starts a replica again that has died or fails its
check. Its own request routers (`ray.serve.request_router`) would choose between the copies of one deployment; they are
an interface in the making, see only estimates of the load, and do not tell which replica a request went to, which the
front must know to notice at once when it dies. Ray's proxies and dashboard are not started: nothing but the front
speaks HTTP to clients.

A cluster of this machine is for this user only: its ports are bound to 127.0.0.1, every call needs a token that is made
for it, and its files are in a folder that nobody else can read, which goes with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.cgroup import usable_cpus
from herd.errors import HerdError, MissingDependency, ResourceError, UsageError
from herd.serve.config import MiB, ServeConfig
from herd.serve.replicas.replica import Replica
from herd.serve.store import Store

log = logging.getLogger("herd.serve")
MOST_REPLICAS = 1024
_PATIENCE = 5.0  # seconds, for a cluster to take a connection
_MOST_CALLS = 1 << 20  # of a replica at a time: it is its own queue that refuses
_PASSED_ON = ("HERD_ISA", "OPENBLAS_NUM_THREADS")  # to processes on other machines; those here have all

_ALWAYS = {"RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "5"}  # there is no other copy that could be asked instead
_LOCAL = {
    "RAY_AUTH_MODE": "token",
    # Not only for those systems: a cluster that may not have other machines listens on 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_COLOR_PREFIX": "0",
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "300",  # it speaks of a cluster that grows
    "RAY_enable_metrics_collection": "0",
    # Two more of Ray's processes tell anybody their figures, without an option to leave that out. They go on without
    # it where the port cannot be had, and this is none.
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
}


def check_replicas(count: int, config: ServeConfig, loading: Mapping[str, Any]) -> None:
    """Raises UsageError for options that cannot be had with replicas, and MissingDependency."""
    if not 1 <= count <= MOST_REPLICAS:
        raise UsageError("--replicas is out of range", value=count, allowed=f"1 to {MOST_REPLICAS}")
    if count == 1:
        return
    threads = loading.get("threads")
    if threads is not None and threads < 1:
        raise UsageError("--threads is out of range", value=threads, allowed="1 or more")
    if loading.get("cpus"):
        raise UsageError("--cpus binds the threads of one process, not of several replicas", fix="leave out --cpus")
    if config.store is not None and joins():
        raise UsageError(
            "a store is a file that only processes of one machine can share, and RAY_ADDRESS names a cluster",
            value=config.store,
            fix="leave out --store, or RAY_ADDRESS",
        )
    if importlib.util.find_spec("ray") is None:  # it is not imported yet: see Cluster
        raise RayMissing("it is not installed")


class RayMissing(MissingDependency):
    """Ray, or a part of it that only its own extra brings: so the fix asks for all that Herd's extra [ray] has."""

    def __init__(self, why: str) -> None:
        fix = f"{shlex.quote(sys.executable)} -m pip install 'ray[serve]>=2.60'"
        HerdError.__init__(self, f"replicas need Ray ({why})", fix=fix)


def joins() -> bool:
    """Whether the replicas are to run in a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _check_reachable(address: str) -> None:
    """Raises ResourceError where nobody listens at HOST:PORT, which Ray would wait for without an end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto" and "local": Ray finds the cluster, or says that there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "start Ray there (ray start --head), correct RAY_ADDRESS, or unset it for replicas on this machine"
        raise ResourceError(f"the cluster of RAY_ADDRESS does not answer ({reason})", value=address, fix=fix) from None


class Cluster:
    """For the time of a `with` block; `handles` has one of Ray Serve's for each replica. Raises ResourceError."""

    def __init__(self, paths: Mapping[str, Path], config: ServeConfig, loading: Mapping[str, Any], count: int) -> None:
        """`loading`: keyword arguments of LLM. Without `threads` this machine's processors are shared out."""
        self._joined = joins()
        self._paths = {name: path.absolute() for name, path in paths.items()}
        self._config = config
        share = usable_cpus() if self._joined else max(1, usable_cpus() // count)
        self._threads: int = loading.get("threads") or share
        self._loading = {**loading, "threads": self._threads}
        self._count = count
        self._name = f"herd-{secrets.token_hex(4)}"
        self._folder: str | None = None
        self._started = False
        self._deployed = False
        self.handles: list[Any] = []

    def __enter__(self) -> Cluster:
        if self._config.store is not None:
            Store(self._config.store).close()  # made, and found good, before several open it at a time
        try:
            self._start()
            self._deploy()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, HerdError) or not isinstance(error, Exception):
                raise
            raise ResourceError(f"Ray cannot run the replicas ({error})", fix="see Ray's message") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray
            from ray import serve

            if self._joined and self._deployed:  # else they end with the cluster
                for number in range(self._count):
                    with contextlib.suppress(Exception):  # of one that had not come so far
                        serve.delete(self._name_of(number), _blocking=False)
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        if self._joined:
            _check_reachable(os.environ["RAY_ADDRESS"])
        else:
            if "ray" in sys.modules:
                raise ResourceError("Ray was imported already, and reads only then how a cluster is to be protected")
            os.environ |= _LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
            os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's own, 15, replicas starve beside anything
        os.environ |= _ALWAYS
        log.info("starting %d replicas through Ray: the address is there in some ten seconds", self._count)
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise RayMissing(str(error)) from None

        self._started = True
        common: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": "herd"}
        if self._joined:
            ray.init(**common)
        else:
            # Ray's sockets are in it, whose names must not be long, so it is not where TMPDIR may say.
            self._folder = tempfile.mkdtemp(prefix="herd-", dir="/tmp")
            # Ray opens the folder that it is given to all users, so it gets one inside of ours, which stays closed.
            ray.init(
                address="local",
                num_cpus=self._count * self._threads,
                include_dashboard=False,
                object_store_memory=max(256 * MiB, 4 * self._config.max_body_bytes),
                _temp_dir=str(Path(self._folder, "r")),
                **common,
            )
        # Ray's own handler ends the process at once; this one lets the block end. A server brings its own later.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)

    def _deploy(self) -> None:
        from ray import serve
        from ray.serve import RunTarget

        actor: dict[str, Any] = {"num_cpus": self._threads}
        if self._joined:
            actor["runtime_env"] = {"env_vars": {name: os.environ[name] for name in _PASSED_ON if name in os.environ}}
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=1,
            max_ongoing_requests=_MOST_CALLS,
            graceful_shutdown_timeout_s=2.0,
            ray_actor_options=actor,
        )
        application = deployment.bind(self._paths, self._config, self._loading, not self._joined)
        self._deployed = True
        self.handles = serve.run_many(
            [
                RunTarget(target=application, name=self._name_of(number), route_prefix=None, logging_config=_QUIET)
                for number in range(self._count)
            ],
            wait_for_applications_running=False,
        )

    def _name_of(self, number: int) -> str:
        return f"{self._name}-{number}"


_QUIET = {"log_level": "WARNING", "enable_access_log": False}
