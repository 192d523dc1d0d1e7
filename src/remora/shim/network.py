"""The pod's network, as CNI made it, handed through to the guest.

CNI gives the pod a network namespace with a configured `eth0`. Each such interface gets a tap beside it, and two
traffic filters that pass every frame between them (tcfilter); the guest takes over MAC, MTU, addresses and routes. So
pod addresses, services, probes and bandwidth shaping work as for any pod, and nothing else of the host is reachable.
"""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any, NamedTuple

from remora.errors import FailedPreconditionError
from remora.shim.tools import run
from remora.vmm.contract import Network
from remora.wire import guest_pod_v1 as guest

_CLONE_NEWNET = 0x40000000
_MAX_INTERFACES = 4


class Found(NamedTuple):
    """What a pod's network namespace holds."""

    networks: tuple[Network, ...]
    links: tuple[guest.Link, ...]
    addresses: tuple[guest.Address, ...]
    routes: tuple[guest.Route, ...]


NONE = Found((), (), (), ())


def enter(path: str) -> None:
    """Move this thread, and every thread and process that it starts, into a network namespace.

    Raises:
        FailedPreconditionError: there is no such namespace.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FailedPreconditionError(f"the pod's network namespace {path}: {error.strerror}") from error
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise FailedPreconditionError(
                f"the pod's network namespace {path} cannot be entered: {os.strerror(ctypes.get_errno())}"
            )
    finally:
        os.close(fd)


def prepare() -> Found:
    """Make a tap for each interface of the current network namespace, joined to it.

    Raises:
        FailedPreconditionError: ip or tc is missing or fails.
    """
    links = [
        link for link in _ip("address", "show") if link.get("link_type") == "ether" and link["operstate"] != "DOWN"
    ]
    links = [link for link in links if not link["ifname"].startswith("tap")][:_MAX_INTERFACES]
    if not links:
        return NONE
    routes = [*_ip("route", "show"), *_ip("-6", "route", "show")]
    networks = tuple(
        Network(tap=f"tap{number}", mac=link["address"], mtu=int(link["mtu"])) for number, link in enumerate(links)
    )
    commands, filters = [], []
    for network, link in zip(networks, links, strict=True):
        name = link["ifname"]
        commands.append(f"tuntap add dev {network.tap} mode tap vnet_hdr")
        commands.append(f"link set dev {network.tap} mtu {network.mtu} up")
        for one, other in ((name, network.tap), (network.tap, name)):
            filters.append(f"qdisc add dev {one} ingress")
            filters.append(
                f"filter add dev {one} parent ffff: protocol all u32 match u8 0 0 "
                f"action mirred egress redirect dev {other}"
            )
    run(["ip", "-batch", "-"], package="iproute2", stdin="\n".join(commands).encode())
    run(["tc", "-batch", "-"], package="iproute2", stdin="\n".join(filters).encode())
    return describe(links, routes, networks)


def describe(links: list[dict[str, Any]], routes: list[dict[str, Any]], networks: tuple[Network, ...]) -> Found:
    """Turn what `ip -json` shows into what the guest is to be given. Pure."""
    names = {link["ifname"] for link in links}
    addresses = [
        guest.Address(prefix=f"{info['local']}/{info['prefixlen']}", interface=link["ifname"])
        for link in links
        for info in link.get("addr_info", [])
        if info.get("scope") == "global"
    ]
    wanted = [
        guest.Route(
            destination=route["dst"],
            gateway=route.get("gateway", ""),
            interface=route["dev"],
            source=route.get("prefsrc", "") if route.get("gateway") else "",
        )
        for route in routes
        # The kernel makes the routes of the addresses themselves.
        if route.get("dev") in names and route.get("protocol") != "kernel" and not route["dst"].startswith("fe80")
    ]
    # A gateway must be reachable before a route may lead through it.
    wanted.sort(key=lambda route: bool(route.gateway))
    cards = [
        guest.Link(mac=network.mac, name=link["ifname"], mtu=network.mtu)
        for network, link in zip(networks, links, strict=True)
    ]
    return Found(networks, tuple(cards), tuple(addresses), tuple(wanted))


def _ip(*arguments: str) -> list[dict[str, Any]]:
    text = run(["ip", "-json", *arguments], package="iproute2")
    found: list[dict[str, Any]] = json.loads(text or b"[]")
    return found
