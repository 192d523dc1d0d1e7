"""The Open Inference Protocol's door: connections with an identity, and both faces of the protocol on each.

Imported only by agents that listen for it: HTTP/2 costs a process 40 ms and 4 MB that others need not pay.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from remora.agent.addresses import means_this_machine
from remora.agent.core import Core
from remora.agent.doors.oip import Inferences
from remora.agent.doors.oip_grpc import GrpcDoor
from remora.agent.doors.oip_rest import RestDoor
from remora.agent.identity import TCP, Identity
from remora.agent.peers import Peer
from remora.agent.web.connection import WebConnection
from remora.agent.web.exchange import Link
from remora.agent.web.http1 import Http1, Http1Exchange, refusal
from remora.agent.web.http2 import Http2
from remora.agent.web.http2_streams import GrpcExchange
from remora.errors import PermissionDeniedError, RemoraError

NAME = "oip"
#: Calls open at once on one connection; more wait at the client (SETTINGS_MAX_CONCURRENT_STREAMS).
_MAX_STREAMS = 100


def _uncounted() -> None:
    """Nobody counts the requests of a connection that belongs to no attachment."""


def _from_a_web_page(exchange: Http1Exchange) -> PermissionDeniedError | None:
    """Return why a request on a loopback port is not answered: a page in a browser here must not speak for its user.

    HTTP/2 needs no such question: browsers speak it over TLS only, where callers have certificates.
    """
    if not exchange.header("origin") and means_this_machine(exchange.header("host")):
        return None
    return PermissionDeniedError(
        "this address answers programs of this machine, not web pages", fix="name it localhost or 127.0.0.1"
    )


class OipDoor:
    """Serves HTTP/1.1 and HTTP/2 connections of callers."""

    def __init__(self, core: Core) -> None:
        self._core = core
        inferences = Inferences(core)
        self._rest = RestDoor(core, inferences)
        self._grpc = GrpcDoor(core, inferences)

    def serve(self, sock: socket.socket, identity: Identity, on_request: Callable[[], None] = _uncounted) -> None:
        """Take over a connection; `on_request` is called with each of its requests."""
        core, limits = self._core, self._core.limits
        try:
            core.peers.check_room(identity)
        except RemoraError as error:
            self.refuse(sock, identity, error)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
        peer = core.peers.join(identity)
        peer.connection = WebConnection(
            core.reactor,
            sock,
            http1=partial(self._http1, peer, on_request),
            http2=partial(self._http2, peer, on_request),
            on_close=lambda: core.peers.leave(peer),
            on_refused=lambda error: core.refused(NAME, "message", peer, error),
            max_out_bytes=limits.out_bytes_per_connection,
            send_timeout_s=limits.frame_timeout_s,
        )

    def refuse(self, sock: socket.socket, identity: Identity, error: RemoraError) -> None:
        """Say why a connection is not served, if the socket takes it at once; then close."""
        self._core.refused(NAME, "connect", Peer(identity, 0.0), error)
        try:
            sock.send(refusal(error))
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # gone already: there is nobody to tell
        finally:
            sock.close()

    def _http1(self, peer: Peer, on_request: Callable[[], None], link: Link) -> Http1:
        def handle(exchange: Http1Exchange) -> None:
            self._count(peer)
            on_request()
            problem = _from_a_web_page(exchange) if peer.identity is TCP else None
            if problem is None:
                self._rest.handle(peer, exchange)
            elif exchange.fail(problem):
                core.refused(NAME, "message", peer, problem)

        core, limits = self._core, self._core.limits
        most_bytes, limit_name = core.message_limit(peer.identity)
        return Http1(
            link,
            handle,
            scratch=core.reactor.scratch,
            allocate=partial(core.peers.allocate, peer.identity.tenant),
            max_body_bytes=most_bytes,
            limit_name=limit_name,
            timeout_s=limits.frame_timeout_s,
            now_s=core.reactor.now_s,
            call_soon=core.reactor.call_soon,
        )

    def _http2(self, peer: Peer, on_request: Callable[[], None], link: Link) -> Http2:
        def handle(exchange: GrpcExchange) -> None:
            self._count(peer)
            on_request()
            self._grpc.handle(peer, exchange)

        core, limits = self._core, self._core.limits
        most_bytes, limit_name = core.message_limit(peer.identity)
        return Http2(
            link,
            handle,
            scratch=core.reactor.scratch,
            allocate=partial(core.peers.allocate, peer.identity.tenant),
            max_body_bytes=most_bytes,
            limit_name=limit_name,
            max_streams=min(_MAX_STREAMS, limits.in_flight_per_connection),
            timeout_s=limits.frame_timeout_s,
            now_s=core.reactor.now_s,
        )

    def _count(self, peer: Peer) -> None:
        peer.requests += 1
        peer.active_s = self._core.reactor.now_s()
