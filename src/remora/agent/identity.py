"""Who is at the other end of a socket. The answer comes from the socket alone, never from what its peer says.

Three kinds: a sandbox (the socket was attached for it through the control socket), a process of this host (its user,
from the kernel's peer credentials), and whoever reaches a loopback TCP port.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from remora.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError

#: sockaddr_un.sun_path holds 108 bytes with the terminating NUL (unix(7)).
MAX_SOCKET_PATH = 107
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Identity:
    """One caller. `key` names it; sessions belong to a key, resources and quotas to a tenant."""

    key: str
    tenant: str
    sandbox: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The template this sandbox was cloned from.
    parent: str = ""
    template: bool = False


def check_name(what: str, name: str) -> str:
    """Return `name` if it is fit to be a sandbox or tenant."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{what} {name[:140]!r} is not a valid name",
            fix="use up to 128 letters, digits, '_', '.' and '-', starting with a letter or digit",
        )
    return name


def of_sandbox(sandbox: str, tenant: str, labels: Mapping[str, str], parent: str, template: bool) -> Identity:
    """Return the identity that `Attach` states. A sandbox without a tenant is a tenant of its own.

    The key and the tenant of a sandbox have a prefix of their own, so that no name can be mistaken for a host user's.
    """
    check_name("sandbox", sandbox)
    owner = f"tenant:{check_name('tenant', tenant)}" if tenant else f"sandbox:{sandbox}"
    if parent:
        check_name("parent", parent)
    return Identity(f"sandbox:{sandbox}", owner, sandbox, dict(labels), parent, template)


def peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end of a Unix socket, as the kernel knows it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid


def of_unix_peer(sock: socket.socket) -> Identity:
    name = f"uid:{peer_uid(sock)}"
    return Identity(name, name)


TCP = Identity("tcp", "tcp")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a Unix socket's `path` or `abstract` name, else host and port.

    `door` is empty for ttrpc, or the one that the scheme names.
    """

    text: str
    path: Path | None = None
    abstract: str = ""
    host: str = ""
    port: int = 0
    door: str = ""
    #: No address of its own: the door is on the socket of every attached sandbox.
    attached: bool = False


#: Scheme prefixes of addresses on which other doors than ttrpc's are served.
DOORS = ("oip",)


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
    """Read `unix:///path`, a bare absolute path, `unix://@name` (abstract) or `tcp://host:port` on loopback.

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
    if text.startswith("tcp://"):
        host, colon, port = text.removeprefix("tcp://").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidArgumentError(f"{text} is not host and port", fix="write tcp://127.0.0.1:2048")
        try:
            loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise InvalidArgumentError(
                f"{text} would be open to other machines, and TCP tells the agent nothing about who calls",
                fix="listen on a loopback address such as tcp://127.0.0.1:2048, or on a Unix socket",
            )
        return Address(text, host="127.0.0.1" if host == "localhost" else host, port=int(port))
    raise InvalidArgumentError(
        f"{text!r} is not an address to listen on", fix="write unix:///path, unix://@name or tcp://127.0.0.1:port"
    )


def check_private_directory(path: Path) -> tuple[int, int]:
    """Return (device, inode) of a directory in which a socket may be made for a guest.

    Raises:
        InvalidArgumentError: not an absolute path of a directory, or a symlink (whoever can replace it could redirect
            the socket), or too long for a socket.
        PermissionDeniedError: it belongs to a user who is neither the agent's nor root, or others may write to it.
    """
    if not path.is_absolute() or path != Path(os.path.normpath(path)):
        raise InvalidArgumentError(f"the directory {path} is not a plain absolute path", fix="give its real path")
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise InvalidArgumentError(f"the directory {path} does not exist", fix="create it first") from error
    except OSError as error:
        raise InvalidArgumentError(f"the directory {path} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symlink" if stat.S_ISLNK(found.st_mode) else "not a directory"
        raise InvalidArgumentError(f"{path} is {kind}", fix="give the sandbox's own directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionDeniedError(
            f"{path} belongs to uid {found.st_uid}, the agent runs as uid {os.geteuid()}",
            fix="let the agent's user own it",
        )
    if found.st_mode & stat.S_IWOTH:
        raise PermissionDeniedError(f"everyone may write to {path}", fix=f"chmod o-w {path}")
    return found.st_dev, found.st_ino


def resolve_loopback(address: Address) -> socket.AddressFamily:
    """Return the socket family of a loopback TCP address."""
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError as error:
        raise FailedPreconditionError(f"{address.text} is not an IP address") from error
    return socket.AF_INET6 if version == 6 else socket.AF_INET
