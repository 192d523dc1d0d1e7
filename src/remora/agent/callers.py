"""Who calls on the agent's own listening sockets: one question for all doors, answered by the kind of socket."""

from __future__ import annotations

import socket
from collections.abc import Callable

from remora.agent.attachments import Attachment
from remora.agent.identity import TCP, Identity, of_user
from remora.agent.peer_process import cgroups, peer_uid
from remora.agent.pods import Resolve, of_pod, pod_of
from remora.errors import UnauthenticatedError

#: Who is refused before anyone knows who it is.
UNKNOWN = Identity("unknown", "unknown")


class Callers:
    """Identifies the peers of accepted sockets."""

    def __init__(self, pod_names: Resolve, attached: Callable[[int], Attachment | None]) -> None:
        """
        Args:
            attached: Returns the sandbox of a vsock CID.
        """
        self._pod_names = pod_names
        self._attached = attached

    def identify(self, sock: socket.socket) -> tuple[Identity, Attachment | None]:
        """Return who is at the other end, with the attachment if it is a sandbox.

        Raises:
            UnauthenticatedError: that cannot be known, or a guest that nobody attached.
        """
        if sock.family == socket.AF_UNIX:
            return self._of_process(sock), None
        if sock.family == socket.AF_VSOCK:
            attachment = self._of_guest(sock)
            return attachment.identity, attachment
        return TCP, None

    def _of_process(self, sock: socket.socket) -> Identity:
        # The pod comes first: root in a pod is not root of the host.
        pod = pod_of(cgroups(sock))
        return of_user(peer_uid(sock)) if pod is None else of_pod(pod, self._pod_names(pod.uid))

    def _of_guest(self, sock: socket.socket) -> Attachment:
        try:
            cid = int(sock.getpeername()[0])
        except OSError as error:
            raise UnauthenticatedError("the guest has gone before it was accepted") from error
        attachment = self._attached(cid)
        if attachment is None:
            # Not a tenant by its number: the next microVM with that number would have what this one left.
            raise UnauthenticatedError(
                f"no sandbox is attached for vsock CID {cid}",
                fix="attach it with this cid (docs/agent.md), before it connects",
            )
        return attachment
