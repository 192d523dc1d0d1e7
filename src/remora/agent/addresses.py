"""Where the agent may listen, as values: parsed and checked before a socket exists.

The forms are the client's (`client.address`), with what listening adds: a door before the scheme, any CID for vsock,
and TLS on every interface. Plain TCP is for loopback alone, because it tells the agent nothing about who calls.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.wire.ports import PORT

#: sockaddr_un.sun_path holds 108 bytes with the terminating NUL (unix(7)).
MAX_SOCKET_PATH = 107
#: Scheme prefixes of addresses on which other doors than ttrpc's are served.
DOORS = ("oip",)
_FORMS = "write unix:///path, unix://@name, vsock://:2048, tcp://127.0.0.1:port or tls://host:port"
#: Names of CIDs to listen on (vsock(7)).
_CIDS = {"": socket.VMADDR_CID_ANY, "any": socket.VMADDR_CID_ANY, "local": 1, "host": socket.VMADDR_CID_HOST}


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a Unix socket's `path` or `abstract` name, a vsock `cid` and port, else host and port.

    `door` is empty for ttrpc, or the one that the scheme names.
    """

    text: str
    path: Path | None = None
    abstract: str = ""
    host: str = ""
    port: int = 0
    door: str = ""
    cid: int | None = None
    tls: bool = False
    #: No address of its own: the door is on the socket of every attached sandbox.
    attached: bool = False

    @property
    def scheme(self) -> str:
        """What precedes `://`."""
        return self.text.partition("://")[0]


def parse_listen_address(text: str) -> Address:
    """Read an address as `parse_address` does, with `oip+` before it for the Open Inference Protocol.

    `oip+attached` is that protocol for attached sandboxes, each on a socket with its identity.
    """
    if text == "oip+attached":
        return Address(text, door="oip", attached=True)
    for door in DOORS:
        if text.startswith(f"{door}+"):
            plain = parse_address(text.removeprefix(f"{door}+"))
            return replace(plain, text=f"{door}+{plain.text}", door=door)
    return parse_address(text)


def parse_address(text: str) -> Address:
    """Read `unix:///path`, a bare absolute path, `unix://@name` (abstract), `vsock://[cid]:port`, `tcp://host:port` on
    loopback, or `tls://host:port`.

    Raises:
        InvalidArgumentError: any other form, or a TCP address that other machines could reach.
    """
    if text.startswith("unix://@"):
        name = text.removeprefix("unix://@")
        if not name or "\0" in name or len(name.encode()) > MAX_SOCKET_PATH - 1:
            raise InvalidArgumentError(f"{text!r} has no name that a socket can have", fix="write unix://@name")
        return Address(text, abstract=name)
    if text.startswith(("unix://", "/")):
        path = Path(text.removeprefix("unix://"))
        if not path.is_absolute():
            raise InvalidArgumentError(f"{text} has no absolute path", fix="write unix:///absolute/path")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise InvalidArgumentError(
                f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes", fix="choose a shorter directory"
            )
        return Address(f"unix://{path}", path=path)
    scheme, _, rest = text.partition("://")
    if scheme == "vsock":
        return _vsock(text, rest)
    if scheme in ("tcp", "tls"):
        return _tcp(text, rest, tls=scheme == "tls")
    raise InvalidArgumentError(f"{text!r} is not an address to listen on", fix=_FORMS)


def _vsock(text: str, rest: str) -> Address:
    cid, colon, port = rest.partition(":")
    number = _CIDS.get(cid, int(cid) if cid.isascii() and cid.isdigit() else -1)
    if not 0 < number <= socket.VMADDR_CID_ANY or (colon and not (port.isascii() and port.isdigit())):
        raise InvalidArgumentError(f"{text} is not a vsock address", fix=f"write vsock://:{PORT} for every guest")
    return Address(text, port=int(port) if colon else PORT, cid=number)


def _tcp(text: str, rest: str, *, tls: bool) -> Address:
    host, colon, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidArgumentError(f"{text} is not host and port", fix=f"write {text[:3]}://127.0.0.1:{PORT}")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
        if tls:
            raise InvalidArgumentError(
                f"{text} is not an IP address and a port",
                fix=f"write tls://0.0.0.0:{PORT}, or the interface's own address",
            ) from None
    if not loopback and not tls:
        raise InvalidArgumentError(
            f"{text} would be open to other machines, and TCP tells the agent nothing about who calls",
            fix="listen on a loopback address such as tcp://127.0.0.1:2048, on a Unix socket, or with certificates "
            "on tls://",
        )
    return Address(text, host=host, port=int(port), tls=tls)


def means_this_machine(host: str) -> bool:
    """True if a Host header (RFC 9110, section 7.2) is what a client on this machine has of a loopback address.

    A web page can have a browser on this machine connect to loopback, under a name of the page's own that it lets
    point here (DNS rebinding): the name in the header is then what gives it away.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower().rstrip(".") in ("", "localhost")
    return True


def family(address: Address) -> socket.AddressFamily:
    """Return the socket family of a TCP address."""
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError as error:
        raise FailedPreconditionError(f"{address.text} is not an IP address") from error
    return socket.AF_INET6 if version == 6 else socket.AF_INET
