"""Seconds from the shell to an answer: `import herd`, `herd --help` and every verb's help, each in a new process.

    python benchmarks/startup.py

Medians of whole processes, Python's own start included, the commands taking turns. The bound is 300 ms; the bare
interpreter is shown beside them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from herd.cli import VERBS

HERD = str(Path(sys.executable).parent / "herd")
BOUND_MS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import herd": [sys.executable, "-c", "import herd"],
        "herd --help": [HERD, "--help"],
        "herd --version": [HERD, "--version"],
        "herd list --json": [HERD, "list", "--json"],
        **{f"herd {verb} --help": [HERD, verb, "--help"] for verb in VERBS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repeat:  # the first round fills the file cache
                seconds[name].append(time.perf_counter() - start)
    print(f"{'command':<22} median ms   max ms")
    for name, times in seconds.items():
        median = 1000 * statistics.median(times)
        mark = "" if median < BOUND_MS else f"   over {BOUND_MS} ms"
        print(f"{name:<22} {median:9.0f} {1000 * max(times):8.0f}{mark}")


if __name__ == "__main__":
    main()
