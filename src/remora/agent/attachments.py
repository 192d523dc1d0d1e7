"""Sandboxes whose socket the agent serves: attached by the host, under an identity that the guest cannot change.

A sandbox is reached through a socket in its directory, or by its vsock CID where the VMM uses the kernel's vsock.

An attachment outlives the agent: it is written down before it is acknowledged, and taken up again by the next agent if
the sandbox's directory is still there. A directory that vanishes ends its attachment; a CID stays until it is detached.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from remora.agent.addresses import MAX_SOCKET_PATH, parse_address
from remora.agent.identity import Identity, check_private_directory, of_sandbox
from remora.agent.inherited import Inherited
from remora.agent.journal import Journal
from remora.agent.listeners import Listener
from remora.errors import AlreadyExistsError, InvalidArgumentError, RemoraError
from remora.reactor import Reactor
from remora.wire.ports import OIP_PORT, PORT

SOCKET_NAME = f"channel.sock_{PORT}"
OIP_SOCKET_NAME = f"channel.sock_{OIP_PORT}"
_MODE = 0o600
_MAX_LABELS = 64
_MAX_LABEL = 256
#: CIDs of guests: those below are the hypervisor's, the loopback's and the host's, the last means any (vsock(7)).
_LEAST_CID, _MOST_CID = 3, 0xFFFFFFFE


@dataclass
class Attachment:
    identity: Identity
    #: As `Attach` said it; empty: a tenant of its own.
    tenant: str
    #: Where its socket is; None for one that is known by its CID alone.
    directory: Path | None = None
    #: Device and inode of the directory: another one of the same name is another sandbox's.
    place: tuple[int, int] = (0, 0)
    listeners: list[Listener] = field(default_factory=list)
    #: The guest's vsock CID; 0 for none.
    cid: int = 0
    requests: int = 0

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


class Attachments:
    """All attached sandboxes."""

    def __init__(
        self,
        reactor: Reactor,
        journal: Journal,
        on_connection: Callable[[Attachment, socket.socket], None],
        on_detached: Callable[[Identity, bool], None],
        inherited: Inherited,
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
        #: Called with the identity of each sandbox that is served from now on.
        self.on_attached: Callable[[Identity], None] = lambda _identity: None
        self._inherited = inherited
        self._by_sandbox: dict[str, Attachment] = {}
        self._by_cid: dict[int, Attachment] = {}

    def __len__(self) -> int:
        return len(self._by_sandbox)

    def all(self) -> list[Attachment]:
        return list(self._by_sandbox.values())

    def listeners(self) -> list[Listener]:
        return [listener for attachment in self._by_sandbox.values() for listener in attachment.listeners]

    def of_cid(self, cid: int) -> Attachment | None:
        """Return the sandbox whose guest has a vsock CID."""
        return self._by_cid.get(cid)

    def recover(self) -> list[tuple[str, str]]:
        """Listen again for the sandboxes that the last agent served; return those that are gone, with the reason."""
        gone = []
        rows = list(self._journal.rows("SELECT sandbox, tenant, labels, directory, parent, template FROM attachments"))
        cids = dict(self._journal.rows("SELECT sandbox, cid FROM attachment_cids"))
        for sandbox, tenant, labels, directory, parent, template in rows:
            identity = of_sandbox(sandbox, tenant, json.loads(labels), parent, bool(template))
            try:
                self._serve(identity, tenant, directory, cids.get(sandbox, 0))
            except RemoraError as error:
                gone.append((sandbox, str(error)))
                self._journal.write(*_forget(sandbox))
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
        *,
        cid: int = 0,
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
            if known.identity == identity and str(known.directory or "") == directory and known.cid == cid:
                done(None)
                return
            raise AlreadyExistsError(
                f"sandbox {sandbox} is attached already, at {known.directory or f'CID {known.cid}'}",
                fix="detach it first",
            )
        self._serve(identity, tenant, directory, cid)
        self._journal.write(
            (
                "INSERT OR REPLACE INTO attachments VALUES (?,?,?,?,?,?)",
                (sandbox, tenant, json.dumps(labels), directory, parent, int(template)),
            ),
            *((("INSERT OR REPLACE INTO attachment_cids VALUES (?,?)", (sandbox, cid)),) if cid else ()),
            durable=True,
            done=done,
        )

    def _serve(self, identity: Identity, tenant: str, directory: str, cid: int) -> None:
        if cid and not _LEAST_CID <= cid <= _MOST_CID:
            raise InvalidArgumentError(
                f"{cid} is not a guest's CID", fix=f"guests have {_LEAST_CID} to {_MOST_CID}; 0 is none"
            )
        if cid in self._by_cid:
            raise AlreadyExistsError(
                f"CID {cid} belongs to sandbox {self._by_cid[cid].identity.sandbox}", fix="detach that one first"
            )
        if not directory and not cid:
            raise InvalidArgumentError("the sandbox has neither a directory nor a CID", fix="give one of them")
        attachment = Attachment(identity, tenant, cid=cid)
        if directory:
            self._listen(attachment, Path(directory))
        self._by_sandbox[identity.sandbox] = attachment
        if cid:
            self._by_cid[cid] = attachment
        self.on_attached(identity)

    def _listen(self, attachment: Attachment, directory: Path) -> None:
        place = check_private_directory(directory)
        attachment.directory, attachment.place = directory, place
        try:
            self._open(attachment, directory / SOCKET_NAME, self._on_connection)
            if self.on_oip is not None:
                self._open(attachment, directory / OIP_SOCKET_NAME, self.on_oip)
        except RemoraError:
            attachment.close()
            raise

    def _open(self, attachment: Attachment, path: Path, serve: Callable[[Attachment, socket.socket], None]) -> None:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise InvalidArgumentError(
                f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes", fix="use a shorter directory"
            )
        address = parse_address(f"unix://{path}")
        sock, kept = self._inherited.bind(address, _MODE)
        own = None if kept else path
        attachment.listeners.append(
            Listener(self._reactor, sock, lambda connection: serve(attachment, connection), own, address=address.text)
        )

    def detach(self, sandbox: str, keep_sessions: bool, done: Callable[[RemoraError | None], None]) -> None:
        """Stop serving a sandbox. One that is not attached may still have kept sessions: they end now."""
        attachment = self._by_sandbox.pop(sandbox, None)
        if attachment is not None:
            attachment.close()
            self._by_cid.pop(attachment.cid, None)
            identity = attachment.identity
        else:
            identity = of_sandbox(sandbox, "", {}, "", False)
        keep = keep_sessions and identity.template
        self._on_detached(identity, keep)
        self._journal.write(*_forget(sandbox), done=done)

    def sweep(self) -> list[str]:
        """Detach the sandboxes whose directory has vanished; return their names."""
        gone = []
        for sandbox, attachment in list(self._by_sandbox.items()):
            if attachment.directory is None:
                continue
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
            attachment.close()
        self._by_sandbox.clear()
        self._by_cid.clear()


def _forget(sandbox: str) -> tuple[tuple[str, tuple[str]], ...]:
    """Return the statements that forget a sandbox."""
    return (
        ("DELETE FROM attachments WHERE sandbox=?", (sandbox,)),
        ("DELETE FROM attachment_cids WHERE sandbox=?", (sandbox,)),
    )


def _ignore(_error: RemoraError | None) -> None:
    """Nobody waits: the sandbox is gone."""
