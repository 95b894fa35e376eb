"""The chat page, as a reader sees it: driven in Chromium by the small Node project in `page/`.

What is tested lies there: the files of `scenarios/` have one export for each test here, `markdown.mjs` what needs no
browser. This file installs the project, starts and kills the server, and reports. Screenshots go to the folder that
HERD_SCREENSHOTS names. Most scenarios need a model that says what they want: page_server.py's, which echoes. Those of
`served.mjs` talk to `herd serve` itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herd.serve.page import chat_page

PROJECT = Path(__file__).parent / "page"
SCENARIOS: dict[str, list[str]] = {
    file.stem: re.findall(r"^export const (\w+) = \{", file.read_text("utf-8"), re.MULTILINE)
    for file in sorted(PROJECT.glob("scenarios/*.mjs"))
}
SERVED = SCENARIOS.pop("served")
MAX_BYTES = 150 << 10
CHROMIUM = os.environ.get("HERD_CHROMIUM") or shutil.which("chromium")


class Server:
    """The server as a process of its own that can be killed and comes back at the same address."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self._key: str | None = None
        self.start()

    def command(self, key: str | None) -> list[str]:
        stand_in = [
            sys.executable,
            str(Path(__file__).parent / "page_server.py"),
            "--port",
            str(self._port),
            "--delay",
            "0",
        ]
        return stand_in + (["--key", key] if key else [])

    def start(self, key: str | None = None) -> None:
        """A server with this key; the one that runs stays if it is such a one."""
        if self._process is not None and key == self._key:
            return
        self.stop()
        self._key = key
        self._process = subprocess.Popen(self.command(key), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self._port = int(self.url.rstrip("/").rpartition(":")[2])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Browser:
    """The driver: a line of JSON for each scenario, and lines back."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._process = subprocess.Popen(
            ["node", "driver.mjs"],
            cwd=PROJECT,
            env={**os.environ, "HERD_CHROMIUM": CHROMIUM or ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.scenarios: list[str] = self._read()["scenarios"]

    def play(self, scenario: str, screenshots: Path, url: str | None = None) -> None:
        self._server.start()
        self._write(scenario=scenario, url=url or self._server.url, screenshots=str(screenshots))
        while request := self._read().get:
            match request("ask"):
                case "stop":
                    self._server.stop()
                case "start":
                    self._server.start(request("key"))
                case _:
                    assert request("passed"), request("failed")
                    return
            self._write(done=True)

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the driver has ended"
        result: dict[str, Any] = json.loads(line)
        return result

    def _write(self, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def project() -> Path:
    """The Node project with its packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    installed, lock = PROJECT / "node_modules" / ".package-lock.json", PROJECT / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"playwright-core cannot be installed: {result.stderr.strip()[-300:]}")
        installed.touch()
    return PROJECT


@pytest.fixture(scope="module")
def browser(project: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (set HERD_CHROMIUM to its path)")
    server = Server()
    driver = Browser(server)
    yield driver
    driver.close()
    server.stop()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("HERD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scenario", [name for names in SCENARIOS.values() for name in names])
def test_page(browser: Browser, scenario: str, screenshots: Path) -> None:
    browser.play(scenario, screenshots)


@pytest.mark.parametrize("scenario", SERVED)
def test_page_of_herd_serve(browser: Browser, served: Any, scenario: str, screenshots: Path) -> None:
    browser.play(scenario, screenshots, served.url)


def test_every_scenario_is_a_test(browser: Browser) -> None:
    assert sorted(browser.scenarios) == sorted(sum(SCENARIOS.values(), SERVED))


def test_markdown(project: Path) -> None:
    result = subprocess.run(["node", "markdown.mjs"], cwd=project, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_page_is_one_small_file_that_asks_for_nothing_else() -> None:
    page = chat_page("N0NCE")
    assert len(page.encode()) <= MAX_BYTES
    assert page.count("<script") == page.count('<script nonce="N0NCE"') == 1
    assert page.count("<style") == page.count('<style nonce="N0NCE"') == 1
    assert not re.findall(r"__[A-Z]+__", page), "everything stands where it belongs"
    addresses = set(re.findall(r"https?://[\w.]+", page))
    assert addresses == {"http://www.w3.org"}, "only the names of XML vocabularies"
    assert '<meta http-equiv="x-dns-prefetch-control" content="off">' in page, "names in links are not looked up"
    markup = page[page.index("<body") : page.index("<script")]
    assert not re.findall(r"\s(?:style|on\w+|src)\s*=", markup), "the policy allows none of these"
    assert not re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", page)
