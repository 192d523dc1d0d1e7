"""The network between a test cluster's nodes: a bridge with the control plane on it, and each node behind a veth.

Whatever nodes, pods and kube-proxy set up in the kernel lies in the nodes' namespaces, so it goes with them: routes,
bridges, nftables rules. The host itself gets one bridge, and routes to pods and services so that tests can be their
clients.
"""

from __future__ import annotations

import os
import socket
import subprocess

from node_spaces import NodeSpaces


def _free_range() -> int:
    """Take a range of addresses for as long as this process lives: clusters beside each other have their own.

    An abstract socket's name is free again when its owner is gone, and is of the network that the addresses are of.
    """
    for number in range(64):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0remora-test-range-{number}")
        except OSError:
            claim.close()
        else:
            claim.detach()
            return number
    raise RuntimeError("64 processes have clusters of their own here, and there are no addresses for another")


_RANGE = _free_range()
_SLOT = _RANGE * 4
SERVICES = f"10.214.{_SLOT}.0/22"
API_SERVICE, DNS_SERVICE = f"10.214.{_SLOT}.1", f"10.214.{_SLOT}.10"
#: Every node's pods are in here: kube-proxy masquerades what calls a service from elsewhere.
PODS = f"10.216.{_SLOT}.0/22"


def pod_subnet(index: int) -> str:
    """Return the first three numbers of the addresses of a node's pods, of up to four nodes."""
    return f"10.216.{_SLOT + index}"


class NodeNetwork:
    """A bridge and its nodes; `close` takes the host's side away."""

    def __init__(self) -> None:
        self.bridge = f"rmk{os.getpid() % 100000}"
        self._prefix = f"10.215.{_RANGE}"
        self._count = 0
        #: The host's address on the bridge: the API server's.
        self.address = f"{self._prefix}.1"

    def start(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add_node(self, node: NodeSpaces, pods: str) -> str:
        """Connect a node, with routes from everywhere to its `pods`; return its address."""
        index, self._count = self._count, self._count + 1
        address, outside = f"{self._prefix}.{index + 2}", f"{self.bridge}v{index}"
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        _ip("link", "set", outside, "master", self.bridge, "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        node.run("ip", "route", "add", "default", "via", self.address)
        node.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        _ip("route", "add", pods, "via", address)
        if not index:
            _ip("route", "add", SERVICES, "via", address)
        return address

    def close(self) -> None:
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
