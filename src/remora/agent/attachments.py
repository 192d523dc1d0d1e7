"""Sandboxes whose socket the agent serves: attached by the host, under an identity that the guest cannot change.

A sandbox is reached through a socket in its directory, or by its vsock CID where the VMM uses the kernel's vsock.

An attachment outlives the agent: it is written down before it is acknowledged, and taken up again by the next agent if
the sandbox's directory is still there. A directory that vanishes ends its attachment; a CID stays until it is detached.
Sandboxes that the agent found by itself (`fleets`) are only noted: the next agent finds them again, or ends them.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from remora.agent.addresses import MAX_SOCKET_PATH, parse_address
from remora.agent.hybrid import HybridSocket
from remora.agent.identity import Identity, check_private_directory, of_sandbox
from remora.agent.inherited import Inherited
from remora.agent.journal import Journal
from remora.agent.listeners import Listener, SocketFile
from remora.errors import AlreadyExistsError, InvalidArgumentError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.wire.ports import OIP_PORT, PORT

_CHANNEL = "channel.sock"
SOCKET_NAME = f"{_CHANNEL}_{PORT}"
OIP_SOCKET_NAME = f"{_CHANNEL}_{OIP_PORT}"
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
    #: Found by the agent itself, not attached by whoever runs it.
    found: bool = False
    #: Where a found one's monitor has its vsock; None for one that is known by its CID alone.
    hybrid: HybridSocket | None = None

    def here(self) -> bool:
        """True if its directory, where it has one, still is the same."""
        if self.directory is None:
            return True
        return _place(self.directory) == self.place

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        if self.hybrid is not None:
            self.hybrid.close()


class Attachments:
    """All attached sandboxes."""

    def __init__(
        self,
        reactor: Reactor,
        journal: Journal,
        on_connection: Callable[[Attachment, socket.socket], None],
        on_detached: Callable[[Identity, bool], None],
        inherited: Inherited,
        refuse: Callable[[Attachment, socket.socket, RemoraError], None],
    ) -> None:
        """
        Args:
            on_detached: Called with the identity and whether its sessions are kept, after the socket is gone.
            refuse: Tells a connection why it is not served, and closes it.
        """
        self._refuse = refuse
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
        #: Name and tenant of those that the last agent found by itself.
        self._found_before: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._by_sandbox)

    def all(self) -> list[Attachment]:
        return list(self._by_sandbox.values())

    def listeners(self) -> list[Listener]:
        return [listener for attachment in self._by_sandbox.values() for listener in attachment.listeners]

    def of_cid(self, cid: int) -> Attachment | None:
        """Return the sandbox whose guest has a vsock CID."""
        attachment = self._by_cid.get(cid)
        if attachment is not None and attachment.found and not attachment.here():
            return None  # the next guest with this CID may be another's
        return attachment

    def recover(self) -> list[tuple[str, str]]:
        """Listen again for the sandboxes that the last agent served; return those that are gone, with the reason."""
        gone = []
        rows = list(self._journal.rows("SELECT sandbox, tenant, labels, directory, parent, template FROM attachments"))
        cids = dict(self._journal.rows("SELECT sandbox, cid FROM attachment_cids"))
        self._found_before = [(row[0], row[1]) for row in self._journal.rows("SELECT * FROM found_sandboxes")]
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

    def attach_found(
        self, identity: Identity, tenant: str, directory: Path, hybrid: Path | None, cid: int
    ) -> Attachment:
        """Serve a sandbox that the agent has found: by its monitor's hybrid socket, or by its CID.

        Raises:
            AlreadyExistsError: a sandbox of this name, or one with this CID, is served already.
            RemoraError: as `HybridSocket`.
        """
        if identity.sandbox in self._by_sandbox:
            raise AlreadyExistsError(f"a sandbox {identity.sandbox} is attached already", fix="detach it first")
        self._check_cid(cid)
        attachment = Attachment(identity, tenant, cid=cid, found=True)
        if hybrid is not None:
            self._listen_beside(attachment, hybrid)
        else:
            attachment.directory, attachment.place = directory, _place(directory)
        self._add(attachment)
        self._journal.write(("INSERT OR REPLACE INTO found_sandboxes VALUES (?,?)", (identity.sandbox, tenant)))
        return attachment

    def refresh_found(self, attachment: Attachment, owner: int, *, listening: bool) -> None:
        """Listen anew if the socket was removed, as scripts do that start a monitor again, or its user has changed.

        Raises as `attach_found`.
        """
        hybrid = attachment.hybrid
        if hybrid is None or self._by_sandbox.get(attachment.identity.sandbox) is not attachment:
            return
        if hybrid.owner == owner and attachment.listeners and (listening or hybrid.has(PORT)):
            return
        attachment.close()
        attachment.listeners.clear()
        self._listen_beside(attachment, hybrid.path)

    def end_found(self, attachment: Attachment) -> bool:
        """Stop serving a sandbox that is gone; False if it was detached before."""
        sandbox = attachment.identity.sandbox
        if self._by_sandbox.get(sandbox) is not attachment:
            return False
        self.detach(sandbox, False, _ignore)
        return True

    def end_lost(self) -> list[str]:
        """End the sandboxes that the last agent found and this one has not; return their names."""
        lost = [(sandbox, tenant) for sandbox, tenant in self._found_before if sandbox not in self._by_sandbox]
        self._found_before.clear()
        for sandbox, tenant in lost:
            self._journal.write(*_forget(sandbox))
            self._on_detached(of_sandbox(sandbox, tenant, {}, "", False), False)
        return [sandbox for sandbox, _tenant in lost]

    def _listen_beside(self, attachment: Attachment, path: Path) -> None:
        hybrid = attachment.hybrid = HybridSocket(path)
        attachment.directory, attachment.place = path.parent, hybrid.place

        def checked(serve: Callable[[Attachment, socket.socket], None], connection: socket.socket) -> None:
            try:
                hybrid.check_peer(connection)
            except RemoraError as error:
                self._refuse(attachment, connection, error)
                return
            serve(attachment, connection)

        try:
            doors = {PORT: self._on_connection, **({OIP_PORT: self.on_oip} if self.on_oip is not None else {})}
            for port, serve in doors.items():
                sock, file, address = hybrid.listen(port, self._inherited)
                attachment.listeners.append(
                    Listener(self._reactor, sock, partial(checked, serve), file, address=address)
                )
        except (RemoraError, OSError) as error:
            attachment.close()
            attachment.listeners.clear()
            if isinstance(error, OSError):
                raise UnavailableError(f"{path.parent} cannot be listened in: {error.strerror}") from error
            raise

    def _check_cid(self, cid: int) -> None:
        if cid and not _LEAST_CID <= cid <= _MOST_CID:
            raise InvalidArgumentError(
                f"{cid} is not a guest's CID", fix=f"guests have {_LEAST_CID} to {_MOST_CID}; 0 is none"
            )
        if cid in self._by_cid:
            raise AlreadyExistsError(
                f"CID {cid} belongs to sandbox {self._by_cid[cid].identity.sandbox}", fix="detach that one first"
            )

    def _add(self, attachment: Attachment) -> None:
        self._by_sandbox[attachment.identity.sandbox] = attachment
        if attachment.cid:
            self._by_cid[attachment.cid] = attachment
        self.on_attached(attachment.identity)

    def _serve(self, identity: Identity, tenant: str, directory: str, cid: int) -> None:
        self._check_cid(cid)
        if not directory and not cid:
            raise InvalidArgumentError("the sandbox has neither a directory nor a CID", fix="give one of them")
        attachment = Attachment(identity, tenant, cid=cid)
        if directory:
            self._listen(attachment, Path(directory))
        self._add(attachment)

    def _listen(self, attachment: Attachment, directory: Path) -> None:
        if _is_jail(directory):
            self._listen_beside(attachment, directory / _CHANNEL)
            return
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
        own = None if kept else SocketFile(path)
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
        """Detach the sandboxes whose directory has vanished; return their names. Whoever found one looks after it."""
        gone = []
        for sandbox, attachment in list(self._by_sandbox.items()):
            if not attachment.found and not attachment.here():
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
        ("DELETE FROM found_sandboxes WHERE sandbox=?", (sandbox,)),
    )


def _is_jail(directory: Path) -> bool:
    """True for the root of a jailed monitor: it belongs to the user that the monitor runs as."""
    try:
        return directory.lstat().st_uid not in (0, os.geteuid())
    except OSError:
        return False


def _place(directory: Path) -> tuple[int, int]:
    """Return device and inode; zeros for a directory that is not there."""
    try:
        found = directory.lstat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _ignore(_error: RemoraError | None) -> None:
    """Nobody waits: the sandbox is gone."""
