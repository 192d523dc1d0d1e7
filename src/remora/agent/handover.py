"""From one agent to the next without a refused connection: the successor's side.

Two steps, so that a successor that cannot start changes nothing. First it gets the listening sockets of the running
agent, which goes on serving, and prepares itself: catalogue, workers. Then it asks the running agent to retire: that
one leaves new connections in the kernel's queue, finishes what runs, closes its journal and ends; the successor opens
the journal, finds all sessions there, and takes the connections that wait. If it dies in between, the old one goes on.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from remora.agent.inherited import Inherited
from remora.agent.listeners import bind_private
from remora.agent.peer_process import peer_uid
from remora.errors import FailedPreconditionError, ProtocolError, UnavailableError, UnimplementedError
from remora.wire import control_v1 as v1
from remora.wire.ttrpc.sync import Client

#: Sockets in one message: the kernel takes up to 253 (SCM_MAX_FD, unix(7)).
BATCH = 64
_MOST_BYTES = 64 << 10
_CALL_S = 10.0


class Predecessor:
    """The agent that runs. Its control connection says to it that its successor lives."""

    #: How long it may take to end, once it has drained.
    ENDING_S = 30.0

    def __init__(self, client: Client, control: Path, state: Path) -> None:
        self._client = client
        self._control = control
        self._state = state

    @classmethod
    def find(cls, control: Path, state: Path) -> Predecessor | None:
        """Connect to the agent that listens at `control`; None if none does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(control))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        except OSError as error:
            sock.close()
            raise FailedPreconditionError(f"the agent at {control} cannot be asked: {error.strerror}") from error
        return cls(Client(sock), control, state)

    def sockets(self) -> Inherited:
        """Return what it listens on.

        Raises:
            FailedPreconditionError: it uses another state directory, or cannot hand over.
        """
        path = self._control.with_name(f"{self._control.name}.next")
        found: list[tuple[str, socket.socket]] = []
        path.unlink(missing_ok=True)
        with bind_private(path) as listener:
            try:
                while True:
                    request = v1.HandoverRequest(socket=str(path), after=len(found))
                    answer = self._client.call(v1.SERVICE, "Handover", request, v1.HandoverResponse, timeout_s=_CALL_S)
                    self._check(answer)
                    found += _received(listener)
                    if len(found) >= answer.total:
                        return Inherited(found)
            except BaseException as error:
                for _text, sock in found:
                    sock.close()
                if isinstance(error, UnimplementedError):
                    raise FailedPreconditionError(
                        "the running agent is of a version that cannot hand over", fix="drain it, then start this one"
                    ) from error
                raise
            finally:
                path.unlink(missing_ok=True)

    def _check(self, answer: v1.HandoverResponse) -> None:
        if answer.state != str(self._state):
            raise FailedPreconditionError(
                f"the running agent keeps its state in {answer.state}, this one would in {self._state}: its sessions "
                "would be lost",
                fix=f"give --state {answer.state}, or another --control for an agent of its own",
            )

    def retire(self, timeout_s: float) -> int:
        """Have it finish what runs, for so long at most, and end; return how many requests it gave up.

        It answers when nothing runs any more. The state directory is free a moment later.
        """
        request = v1.DrainRequest(timeout_s=timeout_s, successor=True)
        try:
            answer = self._client.call(
                v1.SERVICE, "Drain", request, v1.DrainResponse, timeout_s=timeout_s + self.ENDING_S
            )
        except UnavailableError:
            return 0  # it has ended already
        return answer.given_up

    def close(self) -> None:
        self._client.close()


def _received(listener: socket.socket) -> list[tuple[str, socket.socket]]:
    """Return the sockets of one message."""
    listener.settimeout(_CALL_S)
    sock, _ = listener.accept()
    with sock:
        if peer_uid(sock) not in (0, os.geteuid()):
            raise FailedPreconditionError("another user tries to hand sockets over", fix="see who uses the directory")
        sock.settimeout(_CALL_S)
        data, fds, flags, _ = socket.recv_fds(sock, _MOST_BYTES, BATCH)
    sockets = [socket.socket(fileno=fd) for fd in fds]
    names = json.loads(data)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(names) != len(sockets):
        for one in sockets:
            one.close()
        raise ProtocolError("the running agent's sockets did not all arrive")
    for one in sockets:
        one.set_inheritable(False)
    return list(zip(names, sockets, strict=True))


def send(path: str, sockets: list[tuple[str, socket.socket]]) -> None:
    """Pass sockets to the successor, which listens at `path`: the predecessor's side.

    Raises:
        UnavailableError: it does not.
    """
    names = json.dumps([text for text, _sock in sockets]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
            socket.send_fds(sock, [names], [one.fileno() for _text, one in sockets])
        except OSError as error:
            raise UnavailableError(f"the successor does not listen at {path}: {error.strerror}") from error
