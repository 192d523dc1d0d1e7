"""Who calls, by the kind of socket: processes that are held while they are looked at, and guests by their CID."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_rooms import Box, Rooms, rooms
from remora.agent.attachments import Attachment, Attachments
from remora.agent.callers import Callers
from remora.agent.inherited import Inherited
from remora.agent.peer_process import cgroups
from remora.agent.policy import Limits
from remora.errors import AlreadyExistsError, InvalidArgumentError, RemoraError, UnauthenticatedError


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        try:
            work()
            signal.pause()
        finally:
            os._exit(1)
    return pid


def test_the_process_that_connected_is_the_one_that_is_looked_at(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = socket.socket(socket.AF_UNIX)
        pid = in_child(lambda: client.connect(path))
        accepted, _ = listener.accept()
        with accepted, client:
            assert cgroups(accepted) == Path(f"/proc/{pid}/cgroup").read_text()
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(UnauthenticatedError, match="has ended"):  # a zombie
                cgroups(accepted)
            os.waitpid(pid, 0)
            with pytest.raises(UnauthenticatedError, match="has ended"):
                cgroups(accepted)


class FakeVsock:
    """A vsock connection: this machine's kernel has no loopback for them."""

    family = socket.AF_VSOCK

    def __init__(self, cid: int) -> None:
        self._cid = cid

    def getpeername(self) -> tuple[int, int]:
        return self._cid, 1024


def attach(held: Rooms, attachments: Attachments, sandbox: str, cid: int, tenant: str = "") -> None:
    done: Box[RemoraError | None] = Box()
    attachments.attach(sandbox, tenant, {}, "", "", False, done, cid=cid)
    assert held.wait(done) is None


def new_attachments(held: Rooms) -> Attachments:
    return Attachments(held.reactor, held.journal, lambda *_: None, lambda *_: None, Inherited(), lambda *_: None)


def identify(attachments: Attachments, cid: int) -> Attachment | None:
    callers = Callers(lambda _uid: None, attachments.of_cid)
    return callers.identify(FakeVsock(cid))[1]  # type: ignore[arg-type]  # a fake of the two things that are asked


def test_a_guest_is_known_by_the_cid_it_was_attached_with(tmp_path: Path) -> None:
    with rooms(tmp_path / "state", Limits()) as held:
        attachments = new_attachments(held)
        attach(held, attachments, "web", 42, "acme")
        found = identify(attachments, 42)
        assert found is not None
        assert (found.identity.key, found.identity.tenant) == ("sandbox:web", "tenant:acme")
        with pytest.raises(UnauthenticatedError, match="CID 43"):
            identify(attachments, 43)
        with pytest.raises(AlreadyExistsError, match="sandbox web"):
            attach(held, attachments, "other", 42)
        for cid in (1, 2, 0xFFFFFFFF):
            with pytest.raises(InvalidArgumentError, match="not a guest's CID"):
                attach(held, attachments, "other", cid)
        with pytest.raises(InvalidArgumentError, match="neither a directory nor a CID"):
            attach(held, attachments, "other", 0)
        attachments.close()
        held.settle()
    with rooms(tmp_path / "state", Limits()) as held:  # the next agent knows it, until it is detached
        attachments = new_attachments(held)
        assert attachments.recover() == []
        assert identify(attachments, 42) is not None
        attachments.sweep()
        done: Box[RemoraError | None] = Box()
        attachments.detach("web", False, done)
        held.wait(done)
        with pytest.raises(UnauthenticatedError):
            identify(attachments, 42)
        attach(held, attachments, "next", 42)
        found = identify(attachments, 42)
        assert found is not None
        assert found.identity.tenant == "sandbox:next"
