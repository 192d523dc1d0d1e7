"""TLS to an agent on another machine: certificates from the address or the environment, and a thread that encrypts.

The blocking and the asyncio session both get one end of a socket pair; a thread of its own moves bytes between the
other end and the encrypted connection (`wire.tls` says why that is the simpler way). Imported only for `tls://`.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
import weakref

from remora.errors import FailedPreconditionError, UnauthenticatedError, UnavailableError
from remora.reactor import Reactor
from remora.wire.tls import TlsPump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from remora.client.address import Address, Certificates
    from remora.errors import RemoraError

_CLOSING_S = 5.0


class TlsSocket(socket.socket):
    """The plain end of a TLS connection."""

    tunnel: Optional[_Tunnel] = None


class _Tunnel(threading.Thread):
    """The thread of one connection; ends with it."""

    def __init__(self, address: Address, sock: socket.socket, timeout_s: float) -> None:
        super().__init__(name="remora-tls", daemon=True)
        self.opened = threading.Event()
        self.failure: Optional[Exception] = None
        self.refusal: Optional[RemoraError] = None
        self.plain: Optional[socket.socket] = None
        self._address = address
        self._reactor = Reactor()
        self._closed = False
        certificates = address.certificates
        assert certificates is not None
        name = certificates.name or address.host
        self._spiffe = name if name.startswith("spiffe://") else ""
        self._pump = TlsPump(
            self._reactor,
            sock,
            _context(certificates, check_name=not self._spiffe),
            server_side=False,
            server_name=None if self._spiffe else name,
            handshake_s=timeout_s,
            on_open=self._open,
            on_close=self._close,
        )

    def run(self) -> None:
        while not self._closed:
            self._reactor.run_once()
        self._reactor.close()

    def _open(self, pump: TlsPump) -> None:
        uris = [value for kind, value in pump.certificate().get("subjectAltName", ()) if kind == "URI"]
        if self._spiffe and uris != [self._spiffe]:
            raise ssl.SSLCertVerificationError(1, f"the certificate is of {', '.join(uris) or 'no SPIFFE ID'}")
        self.plain = pump.plain
        self.opened.set()

    def _close(self, pump: TlsPump) -> None:
        self.failure = pump.failure
        self._closed = True
        self.opened.set()

    def let_go(self) -> None:
        """In a child that was forked: the connection is the parent's."""
        for sock in self._pump.descriptors():
            os.close(sock.detach())


def open_socket(address: Address, sock: socket.socket, timeout_s: float) -> TlsSocket:
    """Speak TLS on a connected socket, which is given away; return the plain end.

    Raises:
        UnauthenticatedError: the agent's certificate is not to be trusted.
        UnavailableError: whoever is there does not speak TLS 1.3, or not in time.
        FailedPreconditionError: the certificate files cannot be used.
    """
    began_s = time.monotonic()
    try:
        tunnel = _Tunnel(address, sock, timeout_s)
    except BaseException:
        sock.close()
        raise
    _tunnels.add(tunnel)
    tunnel.start()
    tunnel.opened.wait(timeout_s + _CLOSING_S)
    if tunnel.plain is None:
        error = tunnel.failure
        if isinstance(error, ssl.SSLCertVerificationError):
            raise UnauthenticatedError(
                f"{address} is not the agent that is meant: {getattr(error, 'verify_message', '') or error}",
                fix="see which authority issued its certificate (REMORA_TLS_CA) and for which name (REMORA_TLS_NAME)",
            ) from error
        spent_s = time.monotonic() - began_s
        raise UnavailableError(
            f"{address}: no TLS connection after {spent_s:.1f} s: {_words(error)}",
            fix="see whether the agent listens with tls:// there",
        ) from error
    plain = TlsSocket(fileno=tunnel.plain.detach())
    plain.tunnel = tunnel
    return plain


def refusal(sock: object) -> Optional[RemoraError]:
    """Return why the agent ended a connection, if it was because of this side's certificate.

    With TLS 1.3 a client learns that only after the handshake, by an alert in place of the first answer.
    """
    tunnel = getattr(sock, "tunnel", None)
    if tunnel is None:
        return None
    tunnel.join(_CLOSING_S)
    if not isinstance(tunnel.failure, ssl.SSLError) or "ALERT" not in (tunnel.failure.reason or ""):
        return None
    error = UnauthenticatedError(
        f"the agent does not accept this client: {_words(tunnel.failure)}",
        fix="give a certificate of its authority: REMORA_TLS_CERT and REMORA_TLS_KEY",
    )
    error.__cause__ = tunnel.failure
    return error


def _context(certificates: Certificates, *, check_name: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = check_name
    try:
        if certificates.authorities:
            context.load_verify_locations(certificates.authorities)
        else:
            context.load_default_certs()
        if certificates.certificate:
            context.load_cert_chain(certificates.certificate, certificates.key or None)
    except (OSError, ssl.SSLError) as error:
        raise FailedPreconditionError(
            f"the certificate files ({certificates}) cannot be used: {error.strerror or error}",
            fix="set REMORA_TLS_CA, REMORA_TLS_CERT and REMORA_TLS_KEY to PEM files",
        ) from error
    return context


def _words(error: Optional[Exception]) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return str(error or "no answer")


_tunnels: weakref.WeakSet[_Tunnel] = weakref.WeakSet()


def _let_go() -> None:
    for tunnel in list(_tunnels):
        tunnel.let_go()
    _tunnels.clear()


os.register_at_fork(after_in_child=_let_go)
