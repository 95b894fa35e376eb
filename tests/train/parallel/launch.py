"""Ranks over gloo for tests: forked from a process of their own, so that a crash of theirs is not the test's."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(ranks: int, function: str, out: Path, /, timeout: float = 300, **arguments: Any) -> None:
    """Call `module:function(rank, out, **arguments)` on so many ranks, each with one thread. Fails when one fails."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.train.parallel.launch", str(ranks), function, str(out),
         json.dumps(arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # ranks outlive the process that forked them
        raise
    assert process.returncode == 0, errors[-6000:]


def _rank(rank: int, ranks: int, function: str, out: Path, arguments: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{os.getppid()}", rank=rank, world_size=ranks)
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(rank, out, **arguments)
    dist.barrier()
    dist.destroy_process_group()


def _main() -> None:
    ranks, function, out, arguments = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    importlib.import_module(function.split(":")[0])  # once, before the ranks part
    importlib.import_module("herd.train.parallel.world")
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, ranks, function, out, arguments)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            if os.WIFSIGNALED(status):  # it cannot say so itself
                print(f"a rank died of signal {os.WTERMSIG(status)}", file=sys.stderr, flush=True)
            for other in children:  # they would wait for it for ever
                os.kill(other, 9)
    sys.exit(int(failed))


if __name__ == "__main__":
    _main()
