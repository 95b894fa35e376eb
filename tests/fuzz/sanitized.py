"""Run tests with the compiled part built with sanitisers: `python tests/fuzz/sanitized.py MODULE ARGUMENTS …`.

MODULE is the shared library of `make sanitize`, which takes the place of `herd._native` before anything imports it. The
arguments are pytest's, or a script's after `--script`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys


def main() -> None:
    module, *arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("herd._native", module)
    assert spec is not None and spec.loader is not None
    sys.modules["herd._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["herd._native"])
    if arguments[0] == "--script":
        sys.argv = arguments[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    import pytest

    raise SystemExit(pytest.main(arguments))


if __name__ == "__main__":
    main()
