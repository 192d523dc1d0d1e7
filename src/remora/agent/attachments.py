"""Sandboxes whose socket the agent serves: attached by the host, under an identity that the guest cannot change.

An attachment outlives the agent: it is written down before it is acknowledged, and taken up again by the next agent if
the sandbox's directory is still there. A directory that vanishes ends its attachment.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remora.agent.identity import MAX_SOCKET_PATH, Identity, check_private_directory, of_sandbox
from remora.agent.journal import Journal
from remora.agent.listeners import Listener, bind_unix
from remora.errors import AlreadyExistsError, InvalidArgumentError, RemoraError
from remora.reactor import Reactor
from remora.wire.remora_v1 import OIP_PORT, PORT

SOCKET_NAME = f"channel.sock_{PORT}"
OIP_SOCKET_NAME = f"channel.sock_{OIP_PORT}"
_MODE = 0o600
_MAX_LABELS = 64
_MAX_LABEL = 256


@dataclass
class Attachment:
    identity: Identity
    #: As `Attach` said it; empty: a tenant of its own.
    tenant: str
    directory: Path
    #: Device and inode of the directory: another one of the same name is another sandbox's.
    place: tuple[int, int]
    listeners: list[Listener]
    requests: int = 0


class Attachments:
    """All attached sandboxes."""

    def __init__(
        self,
        reactor: Reactor,
        journal: Journal,
        on_connection: Callable[[Attachment, socket.socket], None],
        on_detached: Callable[[Identity, bool], None],
    ) -> None:
        """
        Args:
            on_detached: Called with the identity and whether its sessions are kept, after the socket is gone.
        """
        self._reactor = reactor
        self._journal = journal
        self._on_connection = on_connection
        #: Takes connections to the sandboxes' Open Inference Protocol socket. Without it they have none.
        self.on_oip: Callable[[Attachment, socket.socket], None] | None = None
        self._on_detached = on_detached
        self._by_sandbox: dict[str, Attachment] = {}

    def __len__(self) -> int:
        return len(self._by_sandbox)

    def all(self) -> list[Attachment]:
        return list(self._by_sandbox.values())

    def recover(self) -> list[tuple[str, str]]:
        """Listen again for the sandboxes that the last agent served; return those that are gone, with the reason."""
        gone = []
        rows = list(self._journal.rows("SELECT sandbox, tenant, labels, directory, parent, template FROM attachments"))
        for sandbox, tenant, labels, directory, parent, template in rows:
            identity = of_sandbox(sandbox, tenant, json.loads(labels), parent, bool(template))
            try:
                self._listen(identity, tenant, Path(directory))
            except RemoraError as error:
                gone.append((sandbox, str(error)))
                self._journal.write(("DELETE FROM attachments WHERE sandbox=?", (sandbox,)))
                # A template whose microVM is gone may still have clones to come: its sessions stay.
                self._on_detached(identity, identity.template)
        return gone

    def attach(
        self,
        sandbox: str,
        tenant: str,
        labels: dict[str, str],
        directory: str,
        parent: str,
        template: bool,
        done: Callable[[RemoraError | None], None],
    ) -> None:
        """Listen for a sandbox; `done` is called once a crash cannot lose the attachment.

        Raises:
            InvalidArgumentError, PermissionDeniedError: the names or the directory cannot be used.
            AlreadyExistsError: a sandbox of this name is attached otherwise.
        """
        if len(labels) > _MAX_LABELS or any(len(key) + len(value) > _MAX_LABEL for key, value in labels.items()):
            raise InvalidArgumentError(
                f"{len(labels)} labels were given; at most {_MAX_LABELS} of {_MAX_LABEL} characters are allowed"
            )
        identity = of_sandbox(sandbox, tenant, labels, parent, template)
        known = self._by_sandbox.get(sandbox)
        if known is not None:
            if known.identity == identity and known.directory == Path(directory):
                done(None)
                return
            raise AlreadyExistsError(
                f"sandbox {sandbox} is attached already, at {known.directory}", fix="detach it first"
            )
        self._listen(identity, tenant, Path(directory))
        self._journal.write(
            (
                "INSERT OR REPLACE INTO attachments VALUES (?,?,?,?,?,?)",
                (sandbox, tenant, json.dumps(labels), directory, parent, int(template)),
            ),
            durable=True,
            done=done,
        )

    def _listen(self, identity: Identity, tenant: str, directory: Path) -> None:
        place = check_private_directory(directory)
        attachment = Attachment(identity, tenant, directory, place, [])
        try:
            self._serve(attachment, SOCKET_NAME, self._on_connection)
            if self.on_oip is not None:
                self._serve(attachment, OIP_SOCKET_NAME, self.on_oip)
        except RemoraError:
            _close(attachment)
            raise
        self._by_sandbox[identity.sandbox] = attachment

    def _serve(self, attachment: Attachment, name: str, serve: Callable[[Attachment, socket.socket], None]) -> None:
        path = attachment.directory / name
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise InvalidArgumentError(
                f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes", fix="use a shorter directory"
            )
        sock = bind_unix(path, _MODE)
        attachment.listeners.append(
            Listener(self._reactor, sock, lambda connection: serve(attachment, connection), path)
        )

    def detach(self, sandbox: str, keep_sessions: bool, done: Callable[[RemoraError | None], None]) -> None:
        """Stop serving a sandbox. One that is not attached may still have kept sessions: they end now."""
        attachment = self._by_sandbox.pop(sandbox, None)
        if attachment is not None:
            _close(attachment)
            identity = attachment.identity
        else:
            identity = of_sandbox(sandbox, "", {}, "", False)
        keep = keep_sessions and identity.template
        self._on_detached(identity, keep)
        self._journal.write(("DELETE FROM attachments WHERE sandbox=?", (sandbox,)), done=done)

    def sweep(self) -> list[str]:
        """Detach the sandboxes whose directory has vanished; return their names."""
        gone = []
        for sandbox, attachment in list(self._by_sandbox.items()):
            try:
                found = attachment.directory.lstat()
                here = (found.st_dev, found.st_ino) == attachment.place
            except OSError:
                here = False
            if not here:
                gone.append(sandbox)
                self.detach(sandbox, attachment.identity.template, _ignore)
        return gone

    def close(self) -> None:
        """Stop listening; the attachments stay written down for the next agent."""
        for attachment in self._by_sandbox.values():
            _close(attachment)
        self._by_sandbox.clear()


def _close(attachment: Attachment) -> None:
    for listener in attachment.listeners:
        listener.close()


def _ignore(_error: RemoraError | None) -> None:
    """Nobody waits: the sandbox is gone."""
