"""Where an agent may be found, as values: parsed and checked before any socket exists.

The same text means the same place here, in the agent's `--listen` and in vAccel's `VACCEL_RPC_ADDRESS`, so that one
setting moves a function between a microVM (vsock or a forwarded Unix socket) and a laptop. A bare TCP address is
accepted on loopback only: requests carry the tenant's data, and nothing encrypts or authenticates them there. Another
machine's agent is reached with `tls://` and certificates, named in the address or in `REMORA_TLS_*`.
"""

from __future__ import annotations

import os

from remora.client.values import Value
from remora.errors import InvalidArgumentError
from remora.wire.ports import PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Mapping, Optional

#: Where PID 1 of a microVM puts the forwarded socket, and where an agent that runs as root listens.
SYSTEM_SOCKET = "/run/remora/accel.sock"
#: The host, seen from a guest (vsock(7)).
HOST_CID = 2
#: Names of vsock peers (vsock(7)): any, hypervisor, local, host. Only the last two can be called.
_CIDS = {"local": 1, "host": HOST_CID}
#: sun_path holds 108 bytes with its terminating NUL (unix(7)).
_MAX_PATH_BYTES = 107

_FORMS = "use unix:///path, unix://@name (abstract), vsock://cid:port, tcp://127.0.0.1:port or tls://host:port"
#: What may follow a `tls://` address after `?`, and the variable that says it for all of them.
_TLS = {"ca": "REMORA_TLS_CA", "cert": "REMORA_TLS_CERT", "key": "REMORA_TLS_KEY", "name": "REMORA_TLS_NAME"}


class Certificates(Value):
    """What TLS needs, as paths of PEM files; empty for none.

    Args:
        authorities: Who may have issued the agent's certificate; empty for the system's.
        certificate: This client's own, with its chain.
        key: Its key; empty if it is in the same file.
        name: Whom to expect, a host name or a SPIFFE ID; empty for the address's host.
    """

    __slots__ = ("authorities", "certificate", "key", "name")

    def __init__(self, authorities: str, certificate: str, key: str, name: str) -> None:
        self.authorities = authorities
        self.certificate = certificate
        self.key = key
        self.name = name


class Address(Value):
    """One place to connect to.

    Args:
        kind: `unix`, `vsock`, `tcp` or `tls`.
        host: Path (`unix`; an abstract name starts with `@`), CID in decimal (`vsock`) or host (`tcp`, `tls`).
        port: 0 for `unix`.
        origin: Where the address came from, for error messages: `address`, `REMORA_ADDRESS`, ..., `default`.
    """

    __slots__ = ("kind", "host", "port", "origin", "certificates")

    def __init__(
        self, kind: str, host: str, port: int, origin: str = "address", certificates: Optional[Certificates] = None
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.origin = origin
        self.certificates = certificates

    @property
    def url(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{host}:{self.port}"

    def __str__(self) -> str:
        return self.url


def parse(text: str, origin: str = "address", environ: Optional[Mapping[str, str]] = None) -> Address:
    """Return the address that `text` names.

    Args:
        text: `unix:///path`, `unix://@name`, `vsock://cid[:port]`, `tcp://host:port`, an absolute path, or
            `tls://host[:port]`, which `?ca=FILE&cert=FILE&key=FILE&name=NAME` may follow.
        origin: Where the text came from, for messages.

    Raises:
        InvalidArgumentError: the text is no address, or plain TCP to another machine.
    """
    if text.startswith("/"):
        return _unix(text, text, origin)
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise InvalidArgumentError(f"{origin}: {text!r} is not an address", fix=_FORMS)
    if scheme == "unix":
        return _unix(rest, text, origin)
    if scheme == "vsock":
        return _vsock(rest, text, origin)
    if scheme == "tcp":
        return _tcp(rest, text, origin)
    if scheme == "tls":
        return _tls(rest, text, origin, os.environ if environ is None else environ)
    raise InvalidArgumentError(f"{origin}: {text!r} has the unknown scheme {scheme!r}", fix=_FORMS)


def candidates(address: Optional[str] = None, environ: Optional[Mapping[str, str]] = None) -> List[Address]:
    """Return the places to try, best first.

    An address that somebody named, as an argument or in the environment, is the only candidate: falling back to
    another agent would run the request where nobody meant it to run.
    """
    if address:
        return [parse(address, environ=environ)]
    env: Mapping[str, str] = os.environ if environ is None else environ
    for name in ("REMORA_ADDRESS", "VACCEL_RPC_ADDRESS"):
        if env.get(name):
            return [parse(env[name], name, env)]
    found = []
    if env.get("REMORA_RUNTIME_DIR"):
        found.append(_socket_in(env["REMORA_RUNTIME_DIR"], "REMORA_RUNTIME_DIR"))
    found.append(Address("unix", SYSTEM_SOCKET, 0, "default"))
    if os.geteuid() != 0:
        run_home = env.get("XDG_RUNTIME_DIR")
        own = os.path.join(run_home, "remora") if run_home else f"/tmp/remora-{os.geteuid()}"
        if _is_own_directory(own):
            found.append(_socket_in(own, "default"))
    found.append(Address("vsock", str(HOST_CID), PORT, "default"))
    return found


def _socket_in(directory: str, origin: str) -> Address:
    path = os.path.join(os.path.abspath(directory), "accel.sock")
    return _unix(path, path, origin)


def _is_own_directory(path: str) -> bool:
    # Anyone may create a directory of this name in /tmp; only our own agent's may be trusted with our requests.
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _unix(path: str, text: str, origin: str) -> Address:
    name = path[1:] if path.startswith("@") else path
    if not name or not path.startswith(("/", "@")):
        raise InvalidArgumentError(
            f"{origin}: {text!r} names no absolute path", fix="use unix:///path (three slashes) or unix://@name"
        )
    if "\0" in path or len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise InvalidArgumentError(
            f"{origin}: the socket path in {text!r} is longer than {_MAX_PATH_BYTES} bytes or holds a NUL",
            fix="use a shorter path, such as one below /run",
        )
    return Address("unix", path, 0, origin)


def _vsock(rest: str, text: str, origin: str) -> Address:
    cid, separator, port = rest.partition(":")
    number = _CIDS.get(cid, _number(cid))
    if number is None or not 0 < number < 0xFFFFFFFF:
        raise InvalidArgumentError(
            f"{origin}: {text!r} names no vsock peer", fix=f"use vsock://{HOST_CID}:{PORT} for the host, from a guest"
        )
    return Address("vsock", str(number), _port(port, text, origin) if separator else PORT, origin)


def _tcp(rest: str, text: str, origin: str) -> Address:
    host, separator, port = rest.rpartition(":")
    if not separator:
        raise InvalidArgumentError(f"{origin}: {text!r} has no port", fix=f"use tcp://127.0.0.1:{PORT}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not _is_loopback(host):
        raise InvalidArgumentError(
            f"{origin}: {text!r} is another machine, and plain TCP is allowed on loopback only",
            fix="use a Unix socket or vsock to the agent of this node, or tls:// to another one's",
        )
    return Address("tcp", host, _port(port, text, origin), origin)


def _tls(rest: str, text: str, origin: str, environ: Mapping[str, str]) -> Address:
    place, _, query = rest.partition("?")
    host, separator, port = place.rpartition(":")
    if not separator or place.endswith("]"):
        host, port = place, str(PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or not all(letter.isalnum() or letter in ".:-_" for letter in host):
        raise InvalidArgumentError(f"{origin}: {text!r} names no host", fix=f"use tls://agent.example:{PORT}")
    given = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if key not in _TLS or not value:
            raise InvalidArgumentError(
                f"{origin}: {part!r} in {text!r} says nothing that TLS knows", fix=f"use {', '.join(_TLS)}"
            )
        given[key] = value
    files = [given.get(key) or environ.get(variable, "") for key, variable in _TLS.items()]
    return Address("tls", host, _port(port, text, origin), origin, Certificates(*files))


def _is_loopback(host: str) -> bool:
    # By text, not by a resolver: what a name resolves to can change between this check and the connection.
    if host in ("localhost", "::1"):
        return True
    parts = host.split(".")
    numbers = [_number(part) for part in parts]
    return len(parts) == 4 and numbers[0] == 127 and all(n is not None and n < 256 for n in numbers)


def _port(text: str, whole: str, origin: str) -> int:
    number = _number(text)
    if number is None or not 0 < number < (1 << 32 if whole.startswith("vsock") else 1 << 16):
        raise InvalidArgumentError(f"{origin}: {text!r} in {whole!r} is not a port", fix=f"the agent's is {PORT}")
    return number


def _number(text: str) -> Optional[int]:
    return int(text) if text.isascii() and text.isdigit() else None
