"""Two nodes on one machine: network namespaces joined by a virtual cable, which need root and `ip` of iproute2.

Processes in one of them see no other network. What runs in them is started, found and ended by the namespace.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SHARDED = Path(__file__).with_name("sharded_script.py")
CABLE = "cable"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


@dataclass
class Node:
    """One namespace with its address, and the launcher that runs there."""

    name: str
    address: str
    log: Path
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def launch(self, first: "Node", *command: str, processes: int, environment: dict[str, str]) -> None:
        """Starts torchrun here; `first` is the node where the nodes meet."""
        words = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
        words += [
            "--nproc-per-node",
            str(processes),
            "--max-restarts",
            "9",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "job",
        ]
        words += ["--rdzv-endpoint", f"{first.address}:29400", "--local-addr", self.address]
        # how long the nodes wait for one more; both namespaces have the machine's name, so the host has to be told
        conf = f"last_call_timeout=8,join_timeout=300,is_host={str(first is self).lower()}"
        words += ["--rdzv-conf", conf, str(SHARDED), *command]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE, "PYTHONPATH": str(ROOT), **environment}
        # torch 2.13 tells a node that comes later nothing of the store that the others share
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.log.open("ab") as log:
            self.launchers.append(
                subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True)
            )

    def kill(self) -> None:
        """Ends every process of the node at once, as a power cut does, and waits until they are gone."""
        for _ in range(100):
            found = ip("netns", "pids", self.name).split()
            for process in found:
                os.kill(int(process), signal.SIGKILL)
            if not found:
                break
            time.sleep(0.1)
        for launcher in self.launchers:
            launcher.wait(timeout=60)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Makes the nodes, and removes them with all that runs in them; their logs are in the folder."""
    nodes = [Node(f"dropkey-{os.getpid()}-{n}", f"10.77.0.{n}", folder / f"node{n}.log") for n in (1, 2)]
    made: list[Node] = []
    try:
        for node in nodes:
            ip("netns", "add", node.name)
            made.append(node)
        ip("link", "add", CABLE, "netns", nodes[0].name, "type", "veth", "peer", "name", CABLE, "netns", nodes[1].name)
        for node in nodes:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", node.name, "link", "set", device, "up")
        yield nodes[0], nodes[1]
    finally:
        for node in made:
            node.kill()
            ip("netns", "delete", node.name)


def why_not(folder: Path) -> str | None:
    """Why there cannot be two nodes here; None if there can."""
    if shutil.which("ip") is None:
        return "needs `ip` of iproute2"
    try:
        with two_nodes(folder) as nodes:
            for node in nodes:
                ip("netns", "exec", node.name, "true")
    except subprocess.CalledProcessError as error:
        return f"may not make network namespaces ({' '.join(error.cmd)}: {error.stderr.strip()})"
    return None
