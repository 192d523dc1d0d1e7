"""Runs a short program of the host to its end. (`subprocess` would cost each shim 12 ms and 2 MB.)"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from remora.errors import FailedPreconditionError


def run(argv: Sequence[str], *, package: str = "", stdin: bytes = b"") -> bytes:
    """Return what the program writes to stdout.

    Args:
        package: Debian package that brings it, for the error's fix.

    Raises:
        FailedPreconditionError: it is not installed, or it failed; the message has its last words.
    """
    out_r, out_w = os.pipe2(os.O_CLOEXEC)
    err_r, err_w = os.pipe2(os.O_CLOEXEC)
    in_fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        os.write(in_fd, stdin)
        os.lseek(in_fd, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((in_fd, 0), (out_w, 1), (err_w, 2))]
        try:
            pid = os.posix_spawnp(
                argv[0], list(argv), os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE], setsigmask=[]
            )
        except FileNotFoundError as error:
            fix = f"install it: apt-get install {package}" if package else None
            raise FailedPreconditionError(f"{argv[0]} is not installed", fix=fix) from error
        finally:
            os.close(out_w)
            os.close(err_w)
        # Little comes on stderr, so that one after the other cannot block.
        output = _read(out_r)
        complaint = _read(err_r).decode(errors="replace").strip()
        _, status = os.waitpid(pid, 0)
    finally:
        for fd in (out_r, err_r, in_fd):
            os.close(fd)
    if status:
        last = complaint.splitlines()[-1] if complaint else f"status {os.waitstatus_to_exitcode(status)}"
        raise FailedPreconditionError(f"{' '.join(argv)[:200]}: {last}")
    return output


def _read(fd: int) -> bytes:
    whole = b""
    while part := os.read(fd, 65536):
        whole += part
    return whole
