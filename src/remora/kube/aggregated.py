"""An aggregated API server for pods' figures: kube-apiserver passes requests for `custom.metrics.k8s.io` on to it.

It believes kube-apiserver alone: a caller needs a certificate of the front proxy's authority, with one of its names,
which kube-apiserver publishes for this purpose. Who may ask for what is decided before, by kube-apiserver's own
authorisation; users' names in the headers are not looked at. Source:
https://kubernetes.io/docs/tasks/extend-kubernetes/configure-aggregation-layer/.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from remora.agent.addresses import Address
from remora.agent.certificates import TlsServer, common_names, server_context
from remora.agent.http import HttpServer, Response
from remora.agent.identity import Identity
from remora.agent.inherited import Inherited
from remora.agent.listeners import Listener, SocketFile
from remora.agent.policy import Limits
from remora.errors import FailedPreconditionError, RemoraError, UnauthenticatedError, UnavailableError
from remora.kube import custom_metrics as v1
from remora.kube.fetching import KubernetesApi
from remora.kube.scraping import Scraper
from remora.reactor import Reactor

#: Where kube-apiserver says by which certificates it is known to aggregated servers.
AUTHENTICATION = ("kube-system", "extension-apiserver-authentication")
#: How often that, and our own certificate, are read again.
_RELOAD_S = 60.0
#: kube-apiserver's headers have all groups of the user.
_MOST_REQUEST_BYTES = 64 << 10
_MOST_CONNECTIONS = 128
_THREADS = 4
_MOST_WAITING = 64


@dataclass(frozen=True, slots=True)
class FrontProxy:
    """By what kube-apiserver is known: PEM of authorities, and common names; no name: any."""

    authorities: str
    names: frozenset[str]


def published(api: KubernetesApi) -> FrontProxy:
    """Return what kube-apiserver publishes.

    Raises:
        FailedPreconditionError: it publishes nothing: its aggregation layer is not configured.
    """
    data = api.config_map(*AUTHENTICATION)
    authorities = data.get("requestheader-client-ca-file", "")
    if not authorities:
        raise FailedPreconditionError(
            f"kube-apiserver publishes no front proxy's authority in {'/'.join(AUTHENTICATION)}",
            fix="start it with --requestheader-client-ca-file and --proxy-client-cert-file, or give --proxy-ca",
        )
    try:
        names = json.loads(data.get("requestheader-allowed-names") or "[]")
        return FrontProxy(authorities, frozenset(map(str, names)))
    except (ValueError, TypeError) as error:
        raise FailedPreconditionError(f"{'/'.join(AUTHENTICATION)} is not readable: {error}") from error


class Certificates:
    """Our own certificate, and the front proxy's authority: what applies now."""

    def __init__(self, certificate: Path, key: Path, proxy: Callable[[], FrontProxy]) -> None:
        self._certificate = certificate
        self._key = key
        self._proxy = proxy
        self._names: frozenset[str] = frozenset()
        self._known: FrontProxy | None = None

    def read(self) -> None:
        """Ask who the front proxy is; blocks. Raises RemoraError: what was known before stays."""
        self._known = self._proxy()

    def accepted(self) -> bytes:
        known = self._known
        return f"{sorted(known.names)} {known.authorities}".encode() if known is not None else b""

    def context(self) -> ssl.SSLContext:
        context = server_context(self._certificate, self._key)
        assert self._known is not None, "read comes first"
        try:
            context.load_verify_locations(cadata=self._known.authorities)
        except (ssl.SSLError, ValueError) as error:
            raise FailedPreconditionError(
                f"the front proxy's authority cannot be used: {error}", fix="give a PEM file with a CA certificate"
            ) from error
        self._names = self._known.names
        return context

    def identify(self, certificate: Mapping[str, Any]) -> Identity:
        names = common_names(certificate)
        if len(names) != 1 or (self._names and names[0] not in self._names):
            raise UnauthenticatedError(
                f"a certificate for {str(names)[:200]} is not the front proxy's",
                fix=f"its names are {', '.join(sorted(self._names))}",
            )
        return Identity(names[0], names[0], remote=True)


class AggregatedServer:
    """Listens from its making on, until `close`. Everything but `figures` happens in the reactor's thread.

    Args:
        pods: Returns the names of a namespace's pods that a selector matches; may block, and raise RemoraError.
    """

    def __init__(
        self,
        reactor: Reactor,
        address: Address,
        certificates: Certificates,
        scraper: Scraper,
        pods: Callable[[str, str], list[str]],
    ) -> None:
        self._reactor = reactor
        self._certificates = certificates
        self._scraper = scraper
        self._pods = pods
        self._pool = ThreadPoolExecutor(_THREADS, "pods")
        self._waiting = 0
        self._closed = False
        self._tls = TlsServer(reactor, certificates, Limits(), certificates.identify)
        self._http = HttpServer(
            reactor, self._answer, most_bytes=_MOST_REQUEST_BYTES, most_connections=_MOST_CONNECTIONS
        )
        sock, _ = Inherited().bind(address, 0o600)
        accepted = partial(self._tls.accept, self._serve, self._refuse, False)
        file = SocketFile(address.path) if address.path is not None else None
        self._listener = Listener(reactor, sock, accepted, file, address=address.text)
        self.port = self._listener.port
        self._reloading = reactor.call_later(_RELOAD_S, self._reload)

    def _serve(self, sock: socket.socket, _identity: Identity) -> None:
        self._http.serve(sock)

    def _refuse(self, sock: socket.socket | None, error: RemoraError) -> None:
        if sock is not None:
            sock.close()
        if not self._closed:
            print(f"remora autoscaling: a caller was refused: {error}", file=sys.stderr, flush=True)

    # -- answering --------------------------------------------------------------------------------------------------

    def _answer(self, target: str, respond: Callable[[Response], None]) -> None:
        try:
            asked = v1.read(target)
            if not isinstance(asked, v1.Query):
                respond(v1.encoded(asked))
            elif asked.name != "*":
                respond(self._values(asked, [asked.name]))
            else:
                self._look_up(asked, respond)
        except RemoraError as error:
            respond(v1.failure(error))

    def _look_up(self, query: v1.Query, respond: Callable[[Response], None]) -> None:
        """Have a thread ask which pods a selector matches."""
        if self._waiting >= _MOST_WAITING:
            raise UnavailableError("too many questions wait for kube-apiserver's answer", fix="ask again later")
        self._waiting += 1

        def ended(response: Response) -> None:
            self._waiting -= 1
            respond(response)

        def look_up() -> None:
            try:
                response = self._values(query, self._pods(query.namespace, query.selector))
            except RemoraError as error:
                response = v1.failure(error)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                response = v1.failure(UnavailableError(f"kube-apiserver's list of pods is not one: {error!r}"))
            self._reactor.post(partial(ended, response))

        self._pool.submit(look_up)

    def _values(self, query: v1.Query, pods: list[str]) -> Response:
        found = self._scraper.figures(query.namespace, pods)
        return v1.encoded(v1.values(query, found, time.time(), time.monotonic()))

    # -- going on ---------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        """Ask in a thread who the front proxy is now, and read the certificate again."""

        def read() -> None:
            try:
                self._certificates.read()
            except RemoraError as error:
                print(f"remora autoscaling: the front proxy stays as it was: {error}", file=sys.stderr, flush=True)
            self._reactor.post(apply)

        def apply() -> None:
            if self._closed:
                return
            self._reloading = self._reactor.call_later(_RELOAD_S, self._reload)
            try:
                self._tls.reload()
            except RemoraError as error:
                print(f"remora autoscaling: the certificates stay as they were: {error}", file=sys.stderr, flush=True)

        threading.Thread(target=read, name="front-proxy", daemon=True).start()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reloading.cancel()
        self._listener.close()
        self._http.close()
        self._tls.close()
        self._pool.shutdown(cancel_futures=True)
