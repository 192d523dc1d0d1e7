"""Callers that hold a certificate: TLS in front of the doors, and the identity that a certificate states.

TLS 1.3 only, and every caller has a certificate of the operator's authority; there are no session tickets, so each
connection proves itself anew. A connection ends when its certificate does, and when the authorities or their revocation
lists change: its peer comes back if it is still accepted. Handshakes are bounded in number and time:
when there are too many, the one that has taken longest gives way, so that a caller who is quick gets in beside any
number of slow ones.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from remora.agent.identity import Identity, check_name
from remora.agent.policy import Limits
from remora.errors import FailedPreconditionError, InvalidArgumentError, RemoraError, UnauthenticatedError
from remora.reactor import Reactor
from remora.wire.tls import TlsPump

#: A SPIFFE ID: trust domain and path (spiffe.io, SPIFFE-ID, section 2); shorter than its 2048 bytes.
_SPIFFE = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/[a-zA-Z0-9._-]+)+")
_MOST_SPIFFE = 512
#: What HTTP clients need to hear for HTTP/2 (RFC 9113, section 3.2).
_ALPN = ["h2", "http/1.1"]

#: Takes over the decrypted connection of a caller.
Serve = Callable[[socket.socket, Identity], None]
#: Tells a connection why it is not served.
Refuse = Callable[[socket.socket | None, RemoraError], None]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The agent's own certificate (with its chain) and key, and the authorities whose certificates it accepts: PEM.

    Revocation lists may follow the authorities. Once there is one, every issuer of callers needs one that is valid now:
    OpenSSL accepts nobody by an old list.
    """

    certificate: Path
    key: Path
    authorities: Path

    def context(self) -> ssl.SSLContext:
        """Read the files.

        Raises:
            FailedPreconditionError: one of them cannot be read, or they do not fit; the message names the file.
        """
        context = server_context(self.certificate, self.key)
        try:
            context.load_verify_locations(self.authorities)
        except (OSError, ssl.SSLError) as error:
            raise FailedPreconditionError(
                f"the authorities in {self.authorities} cannot be used: {_reason(error)}",
                fix="give a PEM file with at least one CA certificate",
            ) from error
        if context.cert_store_stats()["crl"]:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def accepted(self) -> bytes:
        try:
            return self.authorities.read_bytes()
        except OSError:
            return b""  # `context` says what is wrong


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a server's context that takes no caller yet: who issues callers' certificates is to be added.

    Raises:
        FailedPreconditionError: one of the files cannot be read, or they do not fit; the message names them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    try:
        if stat.S_IMODE(os.stat(key).st_mode) & stat.S_IRWXO:
            raise FailedPreconditionError(f"everyone may read the key {key}", fix=f"chmod o= {key}")
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise FailedPreconditionError(
            f"the certificate {certificate} with the key {key} cannot be used: {_reason(error)}",
            fix="give PEM files that belong together",
        ) from error
    return context


def _reason(error: OSError) -> str:
    return error.strerror or str(error) if not isinstance(error, ssl.SSLError) else error.reason or "not PEM"


def of_certificate(certificate: Mapping[str, Any]) -> Identity:
    """Return the identity that a verified certificate states: its SPIFFE ID, else its common name.

    Raises:
        UnauthenticatedError: it has neither, several, or one that is no name.
    """
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    if uris:
        if len(uris) > 1 or len(uris[0]) > _MOST_SPIFFE or not _SPIFFE.fullmatch(uris[0]):
            raise UnauthenticatedError(
                f"the certificate has the URIs {str(uris)[:200]}", fix="one with exactly one SPIFFE ID is accepted"
            )
        return Identity(uris[0], uris[0], remote=True)
    names = common_names(certificate)
    if len(names) != 1:
        raise UnauthenticatedError(
            f"the certificate has {len(names)} common names and no SPIFFE ID", fix="one of either is needed"
        )
    try:
        name = f"cn:{check_name('common name', names[0])}"
    except InvalidArgumentError as error:
        raise UnauthenticatedError(error.message, fix=error.fix) from error
    return Identity(name, name, remote=True)


def common_names(certificate: Mapping[str, Any]) -> list[str]:
    return [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]


class Certificates(Protocol):
    """What a TLS server shows, and whom it accepts."""

    def context(self) -> ssl.SSLContext:
        """Return a new context of what applies now; raises FailedPreconditionError."""

    def accepted(self) -> bytes:
        """Return what says whom `context` accepts: once it changes, everybody has to be looked at again."""


class TlsServer:
    """Handshakes of callers, and the connections that came of them."""

    def __init__(
        self,
        reactor: Reactor,
        files: Certificates,
        limits: Limits,
        identify: Callable[[Mapping[str, Any]], Identity] = of_certificate,
    ) -> None:
        """
        Args:
            identify: Says who holds a verified certificate; raises UnauthenticatedError.

        Raises:
            FailedPreconditionError: as `Certificates.context`.
        """
        self._reactor = reactor
        self._identify = identify
        self._files = files
        self._limits = limits
        self._accepted, self._contexts = self._read()
        self._pending: OrderedDict[TlsPump, None] = OrderedDict()
        self._open: set[TlsPump] = set()

    def _read(self) -> tuple[bytes, dict[bool, ssl.SSLContext]]:
        accepted = self._files.accepted()
        plain, http = self._files.context(), self._files.context()
        http.set_alpn_protocols(_ALPN)
        return accepted, {False: plain, True: http}

    def reload(self) -> None:
        """Read the files again, for connections from now on. Raises as the constructor; the old ones stay then.

        If others are accepted from now on all connections end, for `ssl` cannot look at a certificate a second time.
        """
        before = self._accepted
        self._accepted, self._contexts = self._read()
        if self._accepted != before:
            self.close()

    def accept(self, serve: Serve, refuse: Refuse, http: bool, sock: socket.socket) -> None:
        """Take a connection: `serve` gets it once its peer is known, else `refuse` is called.

        Args:
            refuse: Gets no socket if nothing can be said on it.
        """
        while len(self._pending) >= self._limits.handshakes:
            oldest = next(iter(self._pending))
            oldest.close(TimeoutError("it took longest of too many handshakes (limits.handshakes)"))

        def opened(pump: TlsPump) -> None:
            self._pending.pop(pump, None)
            self._open.add(pump)
            plain = pump.plain
            assert plain is not None
            certificate = pump.certificate()
            left_s = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
            timer = self._reactor.call_later(left_s, pump.close)
            ends[pump] = timer.cancel
            try:
                identity = self._identify(certificate)
            except UnauthenticatedError as error:
                refuse(plain, error)
                return
            serve(plain, identity)

        def ended(pump: TlsPump) -> None:
            ends.pop(pump, lambda: None)()
            self._open.discard(pump)
            if pump in self._pending or pump.plain is None:
                self._pending.pop(pump, None)
                text = f"TLS handshake: {explain(pump.failure)}"
                refuse(None, UnauthenticatedError(text, fix="connect with TLS 1.3 and a certificate"))

        ends: dict[TlsPump, Callable[[], None]] = {}
        pump = TlsPump(
            self._reactor,
            sock,
            self._contexts[http],
            server_side=True,
            handshake_s=self._limits.handshake_timeout_s,
            stall_s=self._limits.frame_timeout_s,
            on_open=opened,
            on_close=ended,
        )
        self._pending[pump] = None

    def unsent(self) -> int:
        """Return how many connections have answers that are not encrypted and sent yet."""
        return sum(pump.unsent for pump in self._open)

    def close(self) -> None:
        """End all connections."""
        for pump in [*self._pending, *self._open]:
            pump.close()


def explain(failure: Exception | None) -> str:
    """Return why a handshake failed, in words for the log."""
    if isinstance(failure, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {failure.verify_message}"
    if isinstance(failure, ssl.SSLError):
        return (failure.reason or "the peer ended it").lower().replace("_", " ")
    return str(failure) if failure is not None else "the peer went away"
