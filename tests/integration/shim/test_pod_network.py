"""The pod's network: CNI as usual on the outside, the same addresses within, and port-forwards to any listener."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

import cri_v1 as cri
from containerd_process import Containerd
from cri_client import Container, Pod

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    dns = cri.Dns(servers=["10.96.0.10"], searches=["test.svc.cluster.local"], options=["ndots:5"])
    with containerd.cri.run_pod("net", dns=dns, sysctls={"net.ipv4.ip_unprivileged_port_start": "80"}) as one:
        yield one


@pytest.fixture(scope="module")
def server(pod: Pod) -> Container:
    """Serves pages on every address at 8080, and on the loopback alone at 8081."""
    script = "mkdir /www; echo page > /www/index.html; httpd -p 127.0.0.1:8081 -h /www; exec httpd -f -p 8080 -h /www"
    return pod.start("sh", "-c", script)


def fetch(address: str, timeout_s: float = 20.0) -> str:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urlopen(f"http://{address}/index.html", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def test_a_probe_by_http_and_tcp_reaches_the_pods_address(pod: Pod, server: Container) -> None:
    assert fetch(f"{pod.ip}:8080") == "page\n"
    with socket.create_connection((pod.ip, 8080), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((pod.ip, 8082), timeout=5)


def test_address_route_name_servers_and_sysctls_are_the_pods(
    containerd: Containerd, pod: Pod, server: Container
) -> None:
    assert f"inet {pod.ip}/24" in server.sh("ip address show dev eth0")
    assert f"default via {containerd.subnet}.1 dev eth0" in server.sh("ip route")
    assert server.sh("cat /etc/resolv.conf") == (
        "search test.svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    )
    assert server.sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "80\n"


def test_two_pods_talk_over_cni(containerd: Containerd, pod: Pod, server: Container) -> None:
    with containerd.cri.run_pod("peer") as peer:
        client = peer.start("sleep", "100000")
        assert client.sh(f"wget -q -O - http://{pod.ip}:8080/index.html") == "page\n"
        assert client.exec("ping", "-c", "1", "-w", "5", pod.ip).exit_code == 0


@pytest.mark.parametrize("port", [8080, 8081], ids=["any address", "loopback alone"])
def test_a_port_forward_reaches_a_listener_in_the_guest(pod: Pod, server: Container, port: int) -> None:
    fetch(f"{pod.ip}:8080")
    with pod.forward(port) as forward:
        forward.send(b"GET /index.html HTTP/1.0\r\n\r\n")
        got = b""
        while b"page\n" not in got:
            message = forward.receive()
            assert message is not None, got
            if message[0] == 0:
                got += message[1]


def test_a_port_forward_to_a_closed_port_ends(pod: Pod) -> None:
    with pod.forward(9999) as forward:
        forward.send(b"hello")
        ended = b""
        while (message := forward.receive()) is not None:
            ended += message[1]
