"""Fixtures for every room: where the real vocabularies and texts lie, and a quiet torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts us in the background has Ctrl-C ignored, and so would every child whose Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow or peer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        for marker in ("slow", "peer"):
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}: run with `make test-all`"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real vocabularies and texts beside the project; they are not ours to distribute."""
    folder = Path(os.environ.get("HERD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data is not at {folder} (set HERD_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return ROOT
