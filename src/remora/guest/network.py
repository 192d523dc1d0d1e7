"""Gives the guest the addresses and routes that CNI gave the pod, through busybox's `ip`."""

from __future__ import annotations

import os

from remora.errors import FailedPreconditionError
from remora.guest import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict

    from remora.wire.guest_pod_v1 import ConfigureRequest

_NET = "/sys/class/net"


def configure(request: ConfigureRequest) -> None:
    """Name the cards, bring them up, and set addresses and routes.

    Raises:
        FailedPreconditionError: a card is missing, or the kernel refuses a setting.
    """
    by_mac = _cards()
    try:
        for link in request.links:
            card = by_mac.get(link.mac.lower())
            if card is None:
                raise FailedPreconditionError(
                    f"the guest has no network card {link.mac}; it has: {', '.join(by_mac) or 'none'}"
                )
            if card != link.name:
                _ip("link", "set", "dev", card, "name", link.name)
            # Duplicate address detection takes a second, and CNI has done it.
            dad = f"/proc/sys/net/ipv6/conf/{link.name}/accept_dad"
            if os.path.exists(dad):
                system.write_text(dad, "0")
            _ip("link", "set", "dev", link.name, "mtu", str(link.mtu), "up")
        for address in request.addresses:
            _ip("address", "add", address.prefix, "dev", address.interface)
        for route in request.routes:
            argv = ["route", "add", route.destination]
            if ":" in route.destination + route.gateway:
                argv.insert(0, "-6")
            if route.gateway:
                argv += ["via", route.gateway]
            if route.source:
                argv += ["src", route.source]
            _ip(*argv, "dev", route.interface)
    except OSError as error:
        raise FailedPreconditionError(f"the guest's network cannot be set up: {error}") from error


def _cards() -> Dict[str, str]:
    found = {}
    for name in os.listdir(_NET):
        if name != "lo":
            found[system.read_text(f"{_NET}/{name}/address").strip()] = name
    return found


def _ip(*arguments: str) -> None:
    system.run([system.BUSYBOX, "ip", *arguments])
