"""`herd pull` against a small stand-in for the hub: resuming, hashes, redirects, gated and missing repositories."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from herd import HerdError, ResourceError, UsageError
from herd.architecture import LlamaConfig
from herd.checkpoint import hub, open_checkpoint, pull, save

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
COMMIT = "a" * 40
REPO = "meta-llama/Tiny-Llama"


@dataclass
class StandIn:
    """The part of the hub's protocol that a download needs, with faults to order."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200  # for everything: 401 and 403 mean gated, 404 missing
    cut_after: list[int] = field(default_factory=list)  # bytes to send before dropping the connection, one per request
    corrupt: bool = False
    ignore_range: bool = False
    evil_name: str | None = None
    elsewhere: str = ""  # where large files are redirected to, as the hub does to its content servers
    log: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)  # verb, path, Range, Authorization
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name.endswith((".safetensors", ".gguf", ".pth")):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def gets(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file's body."""
        return [ranges for verb, path, ranges, _ in self.log if verb == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub: StandIn = self.server.stand_in  # type: ignore[attr-defined]
        hub.log.append((self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.status != 200:
            code = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}.get(hub.status, "")
            return self._send(hub.status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, body)
        if self.path.startswith("/api/models/"):
            names = [*hub.files, *([hub.evil_name] if hub.evil_name else [])]
            data = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)
        name = re.sub(r"^(/cdn|.*/resolve/[^/]+)/", "", self.path)
        if name not in hub.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        large = name.endswith((".safetensors", ".gguf", ".pth"))
        if large and not self.path.startswith("/cdn/"):
            return self._send(302, b"", {
                "Location": f"{hub.elsewhere or hub.url}/cdn/{name}", "X-Linked-Etag": f'"{hub.etag(name)}"',
                "X-Linked-Size": str(len(hub.files[name])), "X-Repo-Commit": COMMIT,
            }, body)  # fmt: skip
        self._send_file(hub, name, body)

    def _send_file(self, hub: StandIn, name: str, body: bool) -> None:
        data = hub.files[name]
        if hub.corrupt and body:
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT}
        ranges, status = self.headers.get("Range"), 200
        if ranges and not hub.ignore_range:
            start = int(ranges.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self._send(status, data, headers, body, hub.cut_after.pop(0) if body and hub.cut_after else None)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def serve() -> Iterator[Callable[[], StandIn]]:
    servers: list[ThreadingHTTPServer] = []

    def start() -> StandIn:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        stand_in = StandIn(port=server.server_address[1])
        server.stand_in = stand_in  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return stand_in

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub_with_model(
    serve: Callable[[], StandIn], tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> StandIn:
    """A repository with a sharded model; the user's own hub, token and files are out of sight."""
    stand_in = serve()
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "_CHUNK", 4096)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    config, weights = small("llama3")
    directory = save(tmp_path / "made", config, weights, max_shard_bytes=60_000)
    stand_in.files = {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
    stand_in.files |= {"README.md": b"# Tiny", "LICENSE.txt": b"free", "original/consolidated.00.pth": b"not wanted"}
    return stand_in


def test_a_repository_is_pulled_and_opened_by_its_name(hub_with_model: StandIn, small: Small, tmp_path: Path) -> None:
    path = pull(REPO)
    assert path == tmp_path / "home" / "models" / REPO
    assert {file.name for file in path.iterdir()} - {"herd-pull.json"} == {
        name for name in hub_with_model.files if "/" not in name
    }
    config, weights = small("llama3")
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.config == config
        assert all(checkpoint[name].tobytes() == weights[name].tobytes() for name in weights)
    record = json.loads((path / "herd-pull.json").read_text())
    assert record["repository"] == REPO and record["revision"] == COMMIT
    assert len(hub_with_model.gets(".safetensors")) > 1
    hub_with_model.log.clear()
    assert pull(REPO) == path
    assert hub_with_model.gets(".safetensors") == []  # nothing comes twice


def test_a_cut_connection_is_resumed_where_it_stopped(hub_with_model: StandIn) -> None:
    name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    hub_with_model.cut_after = [10_000, 5_000]
    path = pull(REPO, name)
    assert path.read_bytes() == hub_with_model.files[name]
    first, second, third = hub_with_model.gets("/cdn/" + name)
    assert first is None
    assert second == "bytes=10000-"
    assert third == "bytes=15000-"
    assert not list(path.parent.glob(".*.part"))


def test_a_stopped_process_is_resumed_by_the_next(hub_with_model: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    hub_with_model.cut_after = [9_000] + [0] * hub._ATTEMPTS
    with pytest.raises(HerdError, match=r"keeps failing.*9,000 of .*same command again"):
        pull(REPO, name)
    hub_with_model.log.clear()
    hub_with_model.cut_after = []
    assert pull(REPO, name).read_bytes() == hub_with_model.files[name]
    assert hub_with_model.gets("/cdn/" + name) == ["bytes=9000-"]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub_with_model: StandIn) -> None:
    name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    hub_with_model.cut_after, hub_with_model.ignore_range = [10_000], True
    assert pull(REPO, name).read_bytes() == hub_with_model.files[name]


def test_a_file_that_changed_is_not_spliced_with_an_old_part(hub_with_model: StandIn) -> None:
    name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    hub_with_model.cut_after = [9_000] + [0] * hub._ATTEMPTS
    with pytest.raises(HerdError):
        pull(REPO, name)
    hub_with_model.cut_after = []
    hub_with_model.files[name] = bytes(reversed(hub_with_model.files[name]))
    assert pull(REPO, name).read_bytes() == hub_with_model.files[name]
    hub_with_model.files[name] = hub_with_model.files[name][:5000]
    assert pull(REPO, name).read_bytes() == hub_with_model.files[name]  # and a finished file is replaced


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "weights"])
def test_damaged_bytes_are_noticed_and_deleted(name: str, hub_with_model: StandIn) -> None:
    """Large files by the SHA-256, small ones by git's SHA-1, that the hub announces."""
    if name == "weights":
        name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    hub_with_model.corrupt = True
    with pytest.raises(HerdError, match=f"{re.escape(name)} arrived damaged"):
        pull(REPO, name)
    home = Path(os.environ["HERD_HOME"]) / "models" / REPO
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_gated_repository_names_the_licence_page(status: int, token: str | None, hub_with_model: StandIn) -> None:
    hub_with_model.status = status
    with pytest.raises(HerdError, match="gated") as caught:
        pull(REPO, token=token)
    assert f"accept the licence at {hub_with_model.url}/{REPO}" in str(caught.value)
    assert ("hf auth login" in str(caught.value)) == (token is None)
    assert "hf_secret" not in str(caught.value)


def test_other_refusals_are_explained(hub_with_model: StandIn) -> None:
    hub_with_model.status = 404
    with pytest.raises(HerdError, match="no such repository"):
        pull(REPO)
    hub_with_model.status = 500
    with pytest.raises(HerdError, match=r"HTTP 500|cannot be reached"):
        pull(REPO)
    hub_with_model.status = 200
    with pytest.raises(HerdError, match=r"no such file.*near names: .*config\.json"):
        pull(REPO, "confg.json")
    for name in ("llama", "a/b/c", "../x/y", "a/..", "a b/c", "https://evil/x"):
        with pytest.raises(UsageError, match="not a repository"):
            pull(name)


def test_a_hub_that_is_not_there_is_explained(hub_with_model: StandIn) -> None:
    with pytest.raises(HerdError, match=r"cannot be reached at http://127.0.0.1:9"):
        pull(REPO, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/evil.safetensors", "..json", "a\\b.json"])
def test_a_repository_cannot_write_outside_its_directory(name: str, hub_with_model: StandIn, tmp_path: Path) -> None:
    hub_with_model.evil_name = name
    hub_with_model.files[name] = b"evil"
    with pytest.raises(HerdError, match=r"is not written here|no such file"):
        pull(REPO, name)
    assert not list(tmp_path.glob("**/*evil*"))


def test_the_token_is_shown_to_the_hub_only(hub_with_model: StandIn, serve: Callable[[], StandIn]) -> None:
    """Large files come from another host, as from the hub's content servers; it must not learn the token."""
    other = serve()
    other.files = hub_with_model.files
    hub_with_model.elsewhere = other.url
    pull(REPO, token="hf_secret")
    assert all(seen == "Bearer hf_secret" for verb, _, _, seen in hub_with_model.log if verb == "GET")
    assert other.log and all(seen is None for _, _, _, seen in other.log)


def test_an_address_that_is_no_web_address_is_not_followed(hub_with_model: StandIn) -> None:
    hub_with_model.elsewhere = "file:///etc"
    name = next(name for name in hub_with_model.files if name.endswith(".safetensors"))
    with pytest.raises(HerdError, match=r"not fetched|cannot be reached"):
        pull(REPO, name)


def test_what_is_pulled_when_no_file_is_named(hub_with_model: StandIn) -> None:
    hub_with_model.files = {"a.Q8_0.gguf": b"GGUF1", "README.md": b""}
    assert (pull(REPO) / "a.Q8_0.gguf").read_bytes() == b"GGUF1"
    hub_with_model.files["a.Q4_0.gguf"] = b"GGUF2"
    with pytest.raises(UsageError, match=r"several GGUF files.*a\.Q4_0\.gguf, a\.Q8_0\.gguf.*herd pull"):
        pull(REPO)
    hub_with_model.files = {"params.json": b"{}", "consolidated.00.pth": b"x", "tokenizer.model": b"y"}
    assert {file.name for file in pull(REPO).iterdir()} >= set(hub_with_model.files)
    hub_with_model.files = {"pytorch_model.bin": b"x"}
    with pytest.raises(HerdError, match="no weights that Herd reads"):
        pull(REPO)


def test_a_full_disk_is_noticed_before_the_download(hub_with_model: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = hub.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="GB"):
        pull(REPO)
    assert hub_with_model.gets(".safetensors") == []


def test_the_command_pulls(hub_with_model: StandIn, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", "from herd.cli import main; main()", "pull", REPO, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["path"] == str(tmp_path / "home" / "models" / REPO)
    assert done.stderr == ""  # no bars where nobody is watching
    hub_with_model.status = 403
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and "accept the licence" in done.stderr and "Traceback" not in done.stderr
