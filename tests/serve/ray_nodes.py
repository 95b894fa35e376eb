"""A Ray cluster of several nodes on this machine, in a process of its own.

As a program it starts two nodes of one processor each, and does what its standard input says, line by line: `add` a
node, `kill` the last one as a machine goes that loses its power. It ends with its input. After each line, and once at
the start, it writes a line of JSON: the cluster's address, and the process of each node's raylet, whose children are
the processes that run there.

It is no part of the test's process as Ray reads its settings when it is imported, and takes SIGTERM for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of it listens on 127.0.0.1
}
_NODE: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
_REPLICA = "ray::ServeReplica"
_TRIES = 3  # Ray gives a node half a minute to start, which on a busy machine may not do


class Nodes:
    """The program above, and what runs on its nodes."""

    def __init__(self) -> None:
        for _ in range(_TRIES):
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
            )
            if self._hear():
                return
            self._process.wait(60)
        raise RuntimeError("Ray's nodes do not start")

    def add(self) -> None:
        self._say("add")

    def kill_last(self) -> None:
        self._say("kill")

    def close(self) -> None:
        self._process.communicate(timeout=120)

    def replicas(self) -> list[list[int]]:
        """Processes of replicas, by node."""
        found: list[list[int]] = []
        for raylet in self.raylets:
            found.append([])
            for pid in _children(raylet):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(_REPLICA.encode()):
                        found[-1].append(pid)
        return found

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._hear(), line

    def _hear(self) -> bool:
        """What it says after a line; False when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            told = json.loads(line)
            self.address: str = told["address"]
            self.raylets: list[int] = told["raylets"]
        return bool(line)


def environment(**more: str) -> dict[str, str]:
    """For all that has to do with such a cluster."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | SETTINGS | more


def _children(parent: int) -> list[int]:
    """Processes that another one started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def _main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_NODE)
    nodes = [cluster.head_node, cluster.add_node(**_NODE)]
    try:
        while True:
            raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
            print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
            match sys.stdin.readline().strip():
                case "add":
                    nodes.append(cluster.add_node(**_NODE))
                case "kill":
                    node = nodes.pop()
                    # Ray would leave what runs there some time yet, in which it takes requests.
                    for pid in _children(node.all_processes["raylet"][0].process.pid):
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)
                    cluster.remove_node(node, allow_graceful=False)
                case _:
                    return
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _main()
