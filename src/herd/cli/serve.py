"""`herd serve`: an OpenAI-compatible server, and a chat page at /."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.options import Loading, shape_of, size_bytes, takes_groups


@takes_groups
def command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL …", help="Models, or NAME=MODEL; the first is loaded at once.")
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Ask for this key (or HERD_API_KEY); may be repeated.")
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Hashed keys with limits, as JSON.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others in without a key.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A further name of this server.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Pages of this server may use the API (CORS).")
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running answers have when the server stops.")] = 30.0,
    deadline: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; further ones are refused.")] = 256,
    max_wait: Annotated[
        float | None, typer.Option(help="Seconds a request may wait for its turn; longer is refused at once.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Answers that are generated together.")] = 64,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For weights, caches and working space of all models, such as 16GiB."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep responses here (SQLite), for previous_response_id.")
    ] = None,
    share_beginnings: Annotated[
        bool, typer.Option("--share-beginnings", help="Of prompts, also between keys, which trust each other.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line to the log for each request: who, what, how it ended.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(metavar="N", help="Processes that have the models, through Ray Serve (1: this one, without).")
    ] = 1,
    loading: Loading,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address as JSON, at once; /ready says when models are loaded.")
    ] = False,
) -> None:
    """Serve models over HTTP: OpenAI's API at /v1, a chat page at /.

    Only this machine can reach the server unless --host says otherwise, which needs a key. Ctrl-C or SIGTERM lets
    running answers end; a second one does not.

    Examples:

        herd serve runs/pocket

        herd serve model.gguf --ctx 8192 --draft ngram --port 8080

        herd serve small=a.gguf large=b.gguf --memory 16GiB

        herd serve model.gguf --host 0.0.0.0 --api-key MY-SECRET

        herd serve model.gguf --replicas 2 --threads 16

        curl localhost:8000/v1/models
    """
    import importlib.util

    from herd.cli.output import emit, speak
    from herd.config import parse_options
    from herd.errors import MissingDependency

    for package in ("starlette", "uvicorn", "orjson", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, extra="serve")
    from herd.serve import Keys, Registry, ServeConfig, read_keys, serve
    from herd.serve.log import write_log

    config = parse_options(
        ServeConfig,
        {
            "host": host,
            "port": port,
            "insecure": insecure,
            "allow_hosts": tuple(allow_host or ()),
            "allow_origins": tuple(allow_origin or ()),
            "grace": grace,
            "deadline": deadline,
            "max_queue": max_queue,
            "max_running": max_running,
            "max_wait": max_wait,
            "memory": None if memory is None else size_bytes(memory),
            "share_beginnings": share_beginnings,
            "store": store,
            "log_requests": log_requests,
        },
    )
    given = api_key or ([os.environ["HERD_API_KEY"]] if os.environ.get("HERD_API_KEY") else [])
    keys = Keys(given, None if api_keys is None else read_keys(api_keys))
    paths = _paths(models)
    _check_context(loading.ctx, paths)
    write_log()

    def started(url: str) -> None:
        data: dict[str, Any] = {"url": url, "ready": f"{url}/ready", "models": list(paths), "key": keys.needed}
        emit(data, as_json, lambda: speak(f"{url}  will serve {', '.join(paths)} once loaded (/ready); Ctrl-C stops\n"))
        sys.stdout.flush()

    if replicas == 1:
        serve(Registry(paths, config, loading.arguments()), config, keys, on_start=started)
        return
    from herd.serve.replicas import serve_replicas

    arguments = replace(loading, threads=None).arguments() | {"threads": loading.threads}  # of machines that may differ
    serve_replicas(paths, config, keys, arguments, replicas, on_start=started)


def _check_context(ctx: int | None, paths: Mapping[str, Path]) -> None:
    """Raises UsageError where a model has not so many tokens of context."""
    from herd.errors import UsageError

    if ctx is None:
        return
    for name, path in paths.items():
        largest = shape_of(str(path)).context_length
        if ctx > largest:
            allowed = f"1 to {largest}"
            raise UsageError(f"--ctx is beyond the context of the model {name}", value=ctx, allowed=allowed)


def _paths(models: list[str]) -> dict[str, Path]:
    """Names and places; a name is what stands before =, else the file's or directory's own."""
    import re

    from herd.checkpoint import resolve
    from herd.errors import UsageError

    found: dict[str, Path] = {}
    for model in models:
        name, equals, place = model.partition("=")
        if not equals or "/" in name:
            name, place = "", model
        path = resolve(place)
        name = name or (Path(place).stem if path.is_file() else Path(place).name or path.name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}", name):
            raise UsageError(
                "this is no name for a model", value=name, allowed="letters, digits and . _ : -", fix="NAME=MODEL"
            )
        if name in found:
            raise UsageError("two models have the same name", value=name, fix="NAME=MODEL gives another one")
        found[name] = path
    return found
