"""The agent with its sockets: listeners, connections with their identity, and which door a call goes to."""

from __future__ import annotations

import os
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from remora.agent import gauges, pages
from remora.agent.addresses import Address, parse_address
from remora.agent.attachments import Attachment, Attachments
from remora.agent.callers import UNKNOWN, Callers
from remora.agent.cards import CatalogueEntry
from remora.agent.core import Core
from remora.agent.doors.control import ControlDoor
from remora.agent.doors.health import Health
from remora.agent.doors.native import NativeDoor
from remora.agent.doors.vaccel import VaccelDoor
from remora.agent.draining import Draining
from remora.agent.http import HttpServer
from remora.agent.identity import Identity
from remora.agent.inherited import Inherited
from remora.agent.listeners import Listener, SocketFile
from remora.agent.logs import Log
from remora.agent.peer_process import peer_uid
from remora.agent.peers import Peer
from remora.agent.pods import PodFiles
from remora.agent.policy import MIB, FleetSettings, Policy
from remora.errors import InvalidArgumentError, RemoraError, UnimplementedError
from remora.reactor import Reactor
from remora.wire import health_v1, remora_v1, vaccel
from remora.wire.ttrpc.calls import Call
from remora.wire.ttrpc.reactor import ServerConnection
from remora.workers.contract import Workers

if TYPE_CHECKING:
    from remora.agent.certificates import CertificateFiles, TlsServer
    from remora.agent.doors.oip_door import OipDoor
    from remora.agent.fleets.finder import Fleets

#: Anyone of this host may connect to the agent's own socket: each is a tenant by its user.
_OPEN_MODE = 0o666
_OWNER_MODE = 0o600
_ATTACHMENT_SWEEP_S = 2.0
#: Connections beyond the limit that are kept for a moment, so that they can be told why; and of one tenant.
_MAX_REFUSED = 64
_MAX_REFUSED_OF_ONE = 8
_REFUSED_S = 2.0
_MAX_CONTROL = 256


#: Takes over a connection whose peer is known.
Serve = Callable[[socket.socket, Identity, "Attachment | None"], None]
#: Tells a connection why it is not served, and closes it.
Refuse = Callable[[socket.socket, Identity, RemoraError], None]


class Agent:
    """A running agent. `listen` and `control` may be called before the reactor runs; `close` ends everything."""

    def __init__(
        self,
        reactor: Reactor,
        state: Path,
        policy: Policy,
        workers: Workers,
        catalogue: Mapping[str, CatalogueEntry],
        log: Log,
        pods: Path,
        inherited: Inherited,
    ) -> None:
        """
        Args:
            pods: Directory of the files that name pods.
            inherited: Listening sockets that are open already.
        """
        self._reactor = reactor
        self._log = log
        self._limits = policy.limits
        self._state = state
        reactor.on_error = self._on_error
        self.core = Core(reactor, state, policy, workers, catalogue, log)
        native, vaccel_door = NativeDoor(self.core), VaccelDoor(self.core)
        self._doors: dict[str, Callable[[Peer, Call], None]] = {remora_v1.SERVICE: native.handle}
        self._doors.update(dict.fromkeys(vaccel.SERVICES, vaccel_door.handle))
        health = Health(self.core, self._doors)
        self._doors[health_v1.SERVICE] = lambda _peer, call: health.handle(call)
        self._oip: OipDoor | None = None
        self._listeners: list[Listener] = []
        self._addresses: list[str] = []
        self._refused: Counter[str] = Counter()
        self._controllers: set[ServerConnection] = set()
        self._http: HttpServer | None = None
        self._inherited = inherited
        self.metrics_address = ""
        self.attachments = Attachments(
            reactor, self.core.journal, self._attached_connection, self.core.end_identity, inherited, self._refuse_guest
        )
        self.attachments.on_attached = self.core.metrics.pods.note
        self._callers = Callers(PodFiles(pods), self.attachments.of_cid)
        self.draining = Draining(self.core, reactor.stop)
        gauges.register(self.core, attachments=lambda: len(self.attachments), draining=lambda: self.draining.begun)
        self._tls: TlsServer | None = None
        self._fleets: Fleets | None = None
        self._closed = False

    # -- listening --------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Serve the sandboxes that the last agent served."""
        for sandbox, reason in self.attachments.recover():
            self._log.info("sandbox gone", sandbox=sandbox, reason=reason)
        if self._fleets is not None:
            self._fleets.start()
        for sandbox in self.attachments.end_lost():
            self._log.info("sandbox gone", sandbox=sandbox, reason="its microVM has gone")
        self._reactor.call_later(_ATTACHMENT_SWEEP_S, self._sweep_attachments)

    def attach_fleets(self, fleets: FleetSettings) -> None:
        """Find others' microVMs from `recover` on."""
        from remora.agent.fleets.finder import Finder, Fleets
        from remora.agent.fleets.layouts import parse_fleet

        finder = Finder([parse_fleet(text) for text in fleets.attach], Path(fleets.containerd))
        self._fleets = Fleets(self._reactor, self.attachments, self._log, finder, self.core.present)

    def listen(self, address: Address) -> str:
        """Serve callers on a Unix socket or a loopback port; return the address with the port that was given."""
        if address.attached:
            self._oip_door()  # here and not in the middle of somebody's request
            self.attachments.on_oip = self._attached_oip
            self._addresses.append(address.text)
            return address.text
        serve, refuse = self._connection, self._refuse
        if address.door == "oip":
            serve, refuse = self._oip_connection, self._oip_door().refuse
        accepted: Callable[[socket.socket], None] = partial(self._accepted, serve, refuse)
        if address.tls:
            accepted = self._tls_accepted(address, serve, refuse)
        listener = self._listen(address, _OPEN_MODE, accepted)
        host = f"[{address.host}]" if ":" in address.host else address.host
        text = f"{address.scheme}://{host}:{listener.port}" if listener.port else address.text
        self._addresses.append(text)
        return text

    def listen_control(self, path: Path) -> None:
        """Serve the host's own side on an owner-only socket."""
        door = ControlDoor(
            self.core,
            self.attachments,
            lambda: list(self._addresses),
            self.metrics_address,
            self.draining,
            lambda: [(listener.address, listener.sock) for listener in self.listeners()],
            self._hand_over,
            self._state,
        )
        address = parse_address(f"unix://{path}")
        self._listen(address, _OWNER_MODE, lambda connection: self._control_connection(connection, door))

    def listen_metrics(self, address: Address, clients: Collection[str] = ()) -> None:
        """Serve /metrics, /healthz and /readyz.

        Args:
            clients: Who may read them over TLS: names of certificates.
        """
        self._http = http = HttpServer.of_pages(self._reactor, pages.of_agent(self.core))
        accepted: Callable[[socket.socket], None] = partial(http.serve, local=bool(address.host))
        if address.tls:
            if not clients:
                raise InvalidArgumentError(
                    f"{address.text} would show every holder of a certificate all tenants' figures",
                    fix="say who may read them: --metrics-client NAME",
                )

            def serve(sock: socket.socket, identity: Identity, _attachment: Attachment | None) -> None:
                if identity.key in clients or identity.key.removeprefix("cn:") in clients:
                    http.serve(sock)
                    return
                sock.close()
                self._log.info("metrics refused", peer=identity.key, change="give --metrics-client, if it may")

            accepted = self._tls_accepted(address, serve, lambda sock, _identity, _error: sock.close())
        listener = self._listen(address, _OWNER_MODE, accepted)
        scheme = "tls" if address.tls else "tcp"
        self.metrics_address = f"{scheme}://{address.host}:{listener.port}" if listener.port else address.text

    def _listen(self, address: Address, mode: int, on_connection: Callable[[socket.socket], None]) -> Listener:
        sock, kept = self._inherited.bind(address, mode)
        file = SocketFile(address.path) if address.path is not None and not kept else None
        listener = Listener(self._reactor, sock, on_connection, file, address=address.text, kept=kept)
        self._listeners.append(listener)
        return listener

    # -- handing over -----------------------------------------------------------------------------------------------

    def drain(self, timeout_s: float) -> None:
        """Finish what runs and end; what is new waits, if somebody else keeps the sockets open."""
        self.draining.begin(timeout_s, set_quiet=self._set_kept_quiet if self._inherited.kept else None)

    def listeners(self) -> list[Listener]:
        """Return everything that a successor has to listen on."""
        return [*self._listeners, *self.attachments.listeners()]

    def _hand_over(self, done: Callable[[int], None], timeout_s: float) -> None:
        """End for a successor that has all sockets."""
        self.draining.begin(timeout_s, done, set_quiet=self._set_handed_over)

    def _set_handed_over(self, handed_over: bool) -> None:
        if self._fleets is not None:
            self._fleets.paused = handed_over
        for listener in self.listeners():
            listener.set_quiet(handed_over)
            listener.handed_over = handed_over

    def _set_kept_quiet(self, quiet: bool) -> None:
        for listener in self._listeners:
            if listener.kept:
                listener.set_quiet(quiet)

    def use_certificates(self, files: CertificateFiles) -> None:
        """Serve `tls://` addresses with these files.

        Raises:
            FailedPreconditionError: they cannot be used.
        """
        from remora.agent.certificates import TlsServer  # OpenSSL: 30 ms of a start that most do without

        self._tls = TlsServer(self._reactor, files, self._limits)
        self.draining.unsent = self._tls.unsent

    def reload_certificates(self) -> None:
        """Read the certificates again; if they cannot be used the old ones stay."""
        if self._tls is None:
            return
        try:
            self._tls.reload()
        except RemoraError as error:
            self._log.error("certificates refused, the old ones stay", error=str(error))
        else:
            self._log.info("certificates reloaded")

    def _tls_accepted(self, address: Address, serve: Serve, refuse: Refuse) -> Callable[[socket.socket], None]:
        if self._tls is None:
            raise InvalidArgumentError(
                f"{address.text} needs certificates", fix="give --tls-cert, --tls-key and --tls-ca"
            )

        def known(sock: socket.socket, identity: Identity) -> None:
            serve(sock, identity, None)

        def unknown(sock: socket.socket | None, error: RemoraError) -> None:
            if sock is not None:
                refuse(sock, UNKNOWN, error)
            elif not self._closed:
                self.core.refused("none", "connect", Peer(UNKNOWN, 0.0), error)

        return partial(self._tls.accept, known, unknown, address.door == "oip")

    # -- connections ------------------------------------------------------------------------------------------------

    def _accepted(self, serve: Serve, refuse: Refuse, sock: socket.socket) -> None:
        try:
            identity, attachment = self._callers.identify(sock)
        except RemoraError as error:
            refuse(sock, UNKNOWN, error)
            return
        serve(sock, identity, attachment)

    def _oip_door(self) -> OipDoor:
        if self._oip is None:
            from remora.agent.doors.oip_door import OipDoor  # HTTP/2: 40 ms and 4 MB, only where it is served

            self._oip = OipDoor(self.core)
        return self._oip

    def _oip_connection(self, sock: socket.socket, identity: Identity, attachment: Attachment | None = None) -> None:
        def count() -> None:
            if attachment is not None:
                attachment.requests += 1

        self._oip_door().serve(sock, identity, count)

    def _attached_oip(self, attachment: Attachment, sock: socket.socket) -> None:
        self._oip_connection(sock, attachment.identity, attachment)

    def _refuse_guest(self, attachment: Attachment, sock: socket.socket, error: RemoraError) -> None:
        self._refuse(sock, attachment.identity, error)

    def _attached_connection(self, attachment: Attachment, sock: socket.socket) -> None:
        self._connection(sock, attachment.identity, attachment)

    def _connection(self, sock: socket.socket, identity: Identity, attachment: Attachment | None = None) -> None:
        peers, limits = self.core.peers, self._limits
        try:
            peers.check_room(identity)
        except RemoraError as error:
            self._refuse(sock, identity, error)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
        peer = peers.join(identity)
        most_bytes, limit_name = self.core.message_limit(identity)
        peer.local = attachment is None and not identity.remote and sock.family == socket.AF_UNIX
        peer.connection = ServerConnection(
            self._reactor,
            sock,
            partial(self._call, peer, attachment),
            max_message_bytes=most_bytes,
            limit_name=limit_name,
            allocate=partial(peers.allocate, identity.tenant),
            on_close=lambda _connection: peers.leave(peer),
            on_refused=lambda error: self.core.refused("none", "message", peer, error),
            max_in_flight=limits.in_flight_per_connection,
            max_out_bytes=limits.out_bytes_per_connection,
            frame_timeout_s=limits.frame_timeout_s,
            send_timeout_s=limits.frame_timeout_s,
        )

    def _call(self, peer: Peer, attachment: Attachment | None, call: Call) -> None:
        peer.requests += 1
        peer.active_s = self._reactor.now_s()
        if attachment is not None:
            attachment.requests += 1
        door = self._doors.get(call.service)
        if door is None:
            error = UnimplementedError(
                f"the agent has no service {call.service[:100]!r}", fix=f"it has {', '.join(self._doors)}"
            )
            self.core.refused("none", "unknown", peer, error)
            raise error
        door(peer, call)

    def _refuse(self, sock: socket.socket, identity: Identity, error: RemoraError) -> None:
        """Tell a connection that is too many why it is, if it asks within a moment; then close it."""
        self.core.refused("none", "connect", Peer(identity, 0.0), error)
        if self._refused.total() >= _MAX_REFUSED or self._refused[identity.tenant] >= _MAX_REFUSED_OF_ONE:
            sock.close()
            return
        self._refused[identity.tenant] += 1

        def answer(call: Call) -> None:
            call.fail(error)
            self._reactor.call_soon(connection.close)

        def closed(_connection: ServerConnection) -> None:
            self._refused -= Counter((identity.tenant,))

        connection = ServerConnection(self._reactor, sock, answer, on_close=closed, max_message_bytes=4096)
        self._reactor.call_later(_REFUSED_S, connection.close)

    def _control_connection(self, sock: socket.socket, door: ControlDoor) -> None:
        uid = peer_uid(sock)
        if uid not in (0, os.geteuid()) or len(self._controllers) >= _MAX_CONTROL:
            self._log.info("control connection refused", uid=uid, connections=len(self._controllers))
            sock.close()
            return
        connection = ServerConnection(
            self._reactor, sock, door.handle, max_message_bytes=MIB, on_close=self._controllers.discard
        )
        self._controllers.add(connection)

    # -- seeing it --------------------------------------------------------------------------------------------------

    def _on_error(self, error: BaseException) -> None:
        """A fault of our own: one line with its trace; the loop goes on."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-8))
        self._log.error("internal error", error=f"{type(error).__name__}: {error}", trace=trace[-1800:])

    def _sweep_attachments(self) -> None:
        if self._closed:
            return
        self._reactor.call_later(_ATTACHMENT_SWEEP_S, self._sweep_attachments)
        for sandbox in self.attachments.sweep():
            self._log.info("sandbox gone", sandbox=sandbox, reason="its directory has vanished")

    def close(self) -> None:
        """Stop listening, close all connections, end the workers. Sessions and attachments stay written down."""
        if self._closed:
            return
        self._closed = True
        if self._fleets is not None:
            self._fleets.close()
        for listener in self._listeners:
            listener.close()
        self.attachments.close()
        if self._tls is not None:
            self._tls.close()
        if self._http is not None:
            self._http.close()
        for connection in list(self._controllers):
            connection.close()
        for peer in list(self.core.peers):
            if peer.connection is not None:
                peer.connection.close()
        self.core.close()
