"""Starts sandboxes for programs that have threads or much memory.

Forking a program with threads is unsafe and forking a big one slow, so such a program starts one light process once
and asks it to fork a keeper for each sandbox: a message, two descriptors, two milliseconds. The spawner ends with its
program.
"""

from __future__ import annotations

import array
import os
import pickle
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

from remora.errors import UnavailableError
from remora.sandboxes.launch import Launch

MAX_REQUEST_BYTES = 1 << 20
MAX_FDS = 64


class Launcher(Protocol):
    """Whatever starts a keeper."""

    def start(self, launch: Launch, fields: dict[str, Any], *, lock_fd: int, leash_fd: int) -> None: ...


class ForkLauncher:
    """Forks the keeper from this process: for the command line, which is light and has one thread."""

    def start(self, launch: Launch, fields: dict[str, Any], *, lock_fd: int, leash_fd: int) -> None:
        from remora.sandboxes.keeper import start_keeper

        start_keeper(launch, fields, lock_fd=lock_fd, leash_fd=leash_fd)


class Spawner:
    """The helper process of this program. Thread-safe; `close` it, or let it end with the program."""

    def __init__(self) -> None:
        self._sock, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        source = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {source!r}); from remora.sandboxes.spawner import serve; serve()"
        with child:
            os.set_inheritable(child.fileno(), True)
            # posix_spawn: the program may have threads. stdin carries the socket.
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", code],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, child.fileno(), 0)],
                setpgroup=0,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        if self._sock.recv(16) != b"ready":
            raise UnavailableError("the process that starts sandboxes could not start")

    def start(self, launch: Launch, fields: dict[str, Any], *, lock_fd: int, leash_fd: int) -> None:
        """Have a keeper forked that gets these descriptors.

        Raises:
            UnavailableError: the spawner is gone.
        """
        fds = [lock_fd, leash_fd, *launch.keep_fds]
        request = pickle.dumps((launch, fields, fds))
        with self._lock:
            try:
                self._sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                answer = self._sock.recv(4096)
            except OSError as error:
                raise UnavailableError("the process that starts sandboxes is gone") from error
        if answer != b"ok":
            raise UnavailableError(f"a sandbox could not be started: {answer.decode(errors='replace')}")

    def close(self) -> None:
        self._sock.close()
        os.waitpid(self._pid, 0)


_shared: Spawner | None = None
_shared_lock = threading.Lock()


def shared() -> Spawner:
    """Return this program's spawner, started on first use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Spawner()
        return _shared


def close_shared() -> None:
    """End this program's spawner; sandboxes go on."""
    global _shared
    with _shared_lock:
        if _shared is not None:
            _shared.close()
            _shared = None


def serve() -> None:
    """The spawner's own program: descriptor 0 is the socket."""
    # Everything that a monitor needs, imported once and shared by all of them.
    from remora.sandboxes import monitor as _monitor  # noqa: F401
    from remora.sandboxes.keeper import start_keeper
    from remora.vmm.process import name_process

    name_process("remora-spawner")
    sock = socket.socket(fileno=os.dup(0))
    os.set_inheritable(sock.fileno(), False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    # Keepers are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sock.send(b"ready")
    while True:
        data, ancillary, _, _ = sock.recvmsg(MAX_REQUEST_BYTES, socket.CMSG_LEN(4 * MAX_FDS))
        if not data:
            return
        received = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(payload[: len(payload) - len(payload) % 4])
        try:
            launch, fields, numbers = pickle.loads(data)
            launch = _renumbered(launch, dict(zip(numbers, received, strict=True)))
            start_keeper(launch, fields, lock_fd=received[0], leash_fd=received[1])
            answer = b"ok"
        except Exception as error:  # noqa: BLE001 - told to the program that asked
            answer = f"{type(error).__name__}: {error}".encode()[:4000]
        for fd in received:
            os.close(fd)
        sock.send(answer)


def _renumbered(launch: Launch, numbers: dict[int, int]) -> Launch:
    """Return `launch` with the descriptors as they are numbered in this process."""
    disks = []
    for disk in launch.vm.disks:
        head, _, number = str(disk.path).rpartition("/")
        is_fd = head == "/proc/self/fd"
        disks.append(disk._replace(path=Path(f"{head}/{numbers[int(number)]}")) if is_fd else disk)
    return launch._replace(
        vm=launch.vm._replace(disks=tuple(disks)), keep_fds=tuple(numbers[fd] for fd in launch.keep_fds)
    )
