"""The network between a test cluster's nodes: a bridge with the control plane on it, and a network namespace per node.

All that nodes, pods and kube-proxy set up in the kernel lies in those namespaces, so it goes with them: routes,
bridges, nftables rules. The host itself gets one bridge, and routes to pods and services so that tests can be their
clients.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

SERVICES = "10.214.0.0/16"
#: Every node's pods are in here: kube-proxy masquerades what calls a service from elsewhere.
PODS = "10.216.0.0/16"


class NodeNetwork:
    """A bridge and its nodes; `close` takes all of it away."""

    def __init__(self) -> None:
        number = os.getpid()
        self._bridge = f"rmk{number % 100000}"
        self._prefix = f"10.215.{number % 250}"
        self._nodes: list[str] = []
        #: The host's address on the bridge: the API server's.
        self.address = f"{self._prefix}.1"

    def start(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def add_node(self, pods: str) -> tuple[str, str]:
        """Make a node's namespace, with routes from everywhere to its `pods`; return its name and its address."""
        index = len(self._nodes)
        name, address = f"{self._bridge}-n{index}", f"{self._prefix}.{index + 2}"
        _ip("netns", "add", name)
        self._nodes.append(name)
        outside = f"{self._bridge}v{index}"
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", outside, "master", self._bridge, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "route", "add", "default", "via", self.address)
        _run(*within(name, ["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"]))
        _ip("route", "add", pods, "via", address)
        if not index:
            _ip("route", "add", SERVICES, "via", address)
        return name, address

    def close(self) -> None:
        for name in self._nodes:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._nodes = []
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)


def within(netns: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs another one in a network namespace, with the host's mounts; "" is the host's own.

    Not `ip netns exec`, which hides the host's cgroups behind a /sys of its own.
    """
    return ["nsenter", f"--net=/run/netns/{netns}", *command] if netns else [*command]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
