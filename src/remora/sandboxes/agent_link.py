"""Keeps a sandbox attached to the node agent, whatever happens to the agent.

The attachment is made over the agent's control socket, and the connection stays open: its end tells that the agent has
gone, and from then on a thread tries again until an agent is back. A sandbox without an agent works; it only has no
accelerator until one is there.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from remora.errors import RemoraError, UnavailableError
from remora.sandboxes.launch import AttachSpec
from remora.wire import control_v1 as v1
from remora.wire.ttrpc.sync import Client

CALL_TIMEOUT_S = 10.0
RETRY_S = 1.0


def dial(control_socket: Path) -> tuple[Client, socket.socket]:
    """Connect to an agent's control socket.

    Raises:
        UnavailableError: no agent runs there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CALL_TIMEOUT_S)
        sock.connect(str(control_socket))
        sock.settimeout(None)
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"no node agent answers at {control_socket}: {error.strerror or error}",
            fix="start one: remora agent, or run without an accelerator: --no-accel",
        ) from error
    return Client(sock), sock


def detach(control_socket: Path, sandbox: str, *, keep_sessions: bool = False) -> None:
    """Tell the agent that a sandbox is gone.

    Raises:
        UnavailableError: no agent runs: there is nothing to detach from.
    """
    client, _ = dial(control_socket)
    try:
        request = v1.DetachRequest(sandbox=sandbox, keep_sessions=keep_sessions)
        client.call(v1.SERVICE, "Detach", request, v1.Empty, timeout_s=CALL_TIMEOUT_S)
    finally:
        client.close()


class AgentLink:
    """One sandbox's attachment. `attach` once, then it looks after itself until `close`."""

    def __init__(self, spec: AttachSpec, sandbox: str, directory: Path) -> None:
        self._spec = spec
        self._sandbox = sandbox
        self._directory = directory
        self._client: Client | None = None
        self._wake_r, self._wake_w = socket.socketpair()
        self._thread: threading.Thread | None = None
        #: Held while the agent is told, so that no grant falls between two tellings.
        self._telling = threading.Lock()

    def attach(self) -> None:
        """Attach now, and again whenever the agent comes back.

        Raises:
            RemoraError: the agent is not there or refuses; the sandbox goes on and later tries are made all the same.
        """
        try:
            watched = self._attach()
        except RemoraError:
            self._watch(None)
            raise
        self._watch(watched)

    def grant(self, ids: Iterable[str]) -> None:
        """Tell the agent of grants that a further container carries; one that is away is told when it is back."""
        with self._telling:
            further = tuple(one for one in ids if one not in self._spec.grants)
            if not further:
                return
            self._spec = self._spec._replace(grants=(*self._spec.grants, *further))
            if self._client is None:
                return
            # On a connection of its own: the other one is watched for its end.
            client, _ = dial(self._spec.control_socket)
            try:
                client.call(v1.SERVICE, "Attach", self._request(), v1.Empty, timeout_s=CALL_TIMEOUT_S)
            finally:
                client.close()

    def close(self, *, detach_sandbox: bool, keep_sessions: bool = False) -> None:
        """Stop looking after the attachment; end it if `detach_sandbox`."""
        self._wake_w.send(b"x")
        if self._thread is not None:
            self._thread.join(CALL_TIMEOUT_S)
        client, self._client = self._client, None
        try:
            if detach_sandbox and client is not None:
                request = v1.DetachRequest(sandbox=self._sandbox, keep_sessions=keep_sessions)
                client.call(v1.SERVICE, "Detach", request, v1.Empty, timeout_s=CALL_TIMEOUT_S)
            elif detach_sandbox:
                # An agent that has just come back may know this sandbox from its journal.
                detach(self._spec.control_socket, self._sandbox, keep_sessions=keep_sessions)
        except UnavailableError:
            pass  # an agent that is gone holds no attachment
        finally:
            if client is not None:
                client.close()
            self._wake_r.close()
            self._wake_w.close()

    def _request(self) -> v1.AttachRequest:
        return v1.AttachRequest(
            sandbox=self._sandbox,
            tenant=self._spec.tenant,
            labels=dict(self._spec.labels),
            directory=str(self._directory),
            parent=self._spec.parent,
            template=self._spec.template,
            grants=list(self._spec.grants),
        )

    def _attach(self) -> socket.socket:
        with self._telling:
            client, sock = dial(self._spec.control_socket)
            try:
                client.call(v1.SERVICE, "Attach", self._request(), v1.Empty, timeout_s=CALL_TIMEOUT_S)
            except BaseException:
                client.close()
                raise
            self._client = client
            return sock

    def _watch(self, sock: socket.socket | None) -> None:
        self._thread = threading.Thread(target=self._follow, args=(sock,), name="agent-link", daemon=True)
        self._thread.start()

    def _follow(self, sock: socket.socket | None) -> None:
        while True:
            watched = [self._wake_r] if sock is None else [self._wake_r, sock]
            ready, _, _ = select.select(watched, [], [], None if sock is not None else RETRY_S)
            if self._wake_r in ready:
                return
            if sock is not None:
                # Nothing is ever sent unasked on this connection: readiness is its end.
                if self._client is not None:
                    self._client.close()
                    self._client = None
                sock = None
            try:
                sock = self._attach()
            except RemoraError:
                sock = None  # not back yet, or refused: the next try is in RETRY_S
