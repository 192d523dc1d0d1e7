"""Being a process: one agent per state directory, limits on descriptors, and telling others that it is ready."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import time
from pathlib import Path
from types import TracebackType

from remora.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, PermissionDeniedError

LOCK_NAME = "agent.pid"
_LOCK_LOOK_S = 0.005


def private_directory(path: Path, what: str) -> Path:
    """Make a directory that only this user may enter.

    Raises:
        PermissionDeniedError, FailedPreconditionError: it cannot be made or used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except PermissionError as error:
        raise PermissionDeniedError(
            f"no permission to make the {what} {path}", fix="choose one that you may write to"
        ) from error
    except OSError as error:
        raise FailedPreconditionError(f"the {what} {path} cannot be made: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise PermissionDeniedError(
            f"the {what} {path} belongs to uid {status.st_uid}", fix="choose a directory of your own"
        )
    return path


class StateLock:
    """The state directory, taken for this process. The lock ends with the process, however it ends.

    Args:
        wait_s: How long to wait for an agent that is about to end.
    """

    def __init__(self, state: Path, wait_s: float = 0.0) -> None:
        self._path = state / LOCK_NAME
        self._wait_s = wait_s
        self._fd = -1

    def __enter__(self) -> StateLock:
        """
        Raises:
            AlreadyExistsError: another agent uses the directory.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        until_s = time.monotonic() + self._wait_s
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until_s:
                        raise
                    time.sleep(_LOCK_LOOK_S)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise AlreadyExistsError(
                f"an agent (pid {holder or 'unknown'}) uses the state directory {self._path.parent} already",
                fix="stop it, or give another --state directory",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let a third agent lock a new one while a second waits for this one.
        os.close(self._fd)


def raise_descriptor_limit(wanted: int) -> int:
    """Let this process have as many descriptors as it is allowed, up to `wanted`; return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        return target
    return soft


def check_ready_fd(fd: int | None) -> None:
    """
    Raises:
        InvalidArgumentError: nothing is open there.
    """
    if fd is not None:
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError as error:
            raise InvalidArgumentError(
                f"--ready-fd {fd} is not an open descriptor", fix="pass the descriptor to this process"
            ) from error


def announce(ready_fd: int | None, text: str) -> None:
    """Tell whoever started this process that it is listening: a line on `ready_fd`, READY=1 to systemd.

    Format: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """
    if ready_fd is not None:
        try:
            os.write(ready_fd, f"{text}\n".encode())
        except BrokenPipeError:
            pass  # whoever asked is gone
        os.close(ready_fd)
    notify = os.environ.get("NOTIFY_SOCKET", "")
    if notify.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(b"READY=1\nSTATUS=listening\n", notify.replace("@", "\0", 1))
            except OSError as error:
                raise FailedPreconditionError(
                    f"NOTIFY_SOCKET={notify} does not answer: {error.strerror}", fix="unset it"
                ) from error
