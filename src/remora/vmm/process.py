"""Starts a program that cannot outlive the thread that started it.

`subprocess` would do, but costs 12 ms of import, and its `preexec_fn` allocates between fork and exec all the same.
Here the child does five system calls and execs.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Sequence

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def set_death_signal(signum: int, parent: int) -> None:
    """Have the kernel send `signum` to this process when its parent's thread ends; exits if it has ended already.

    See prctl(2), PR_SET_PDEATHSIG: the setting survives execve.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """Set what `ps` and `top` show as this process's command (15 characters)."""
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])
    except OSError:
        pass  # only a label


def spawn(arguments: Sequence[str], *, keep_fds: Iterable[int] = (), output_fd: int) -> int:
    """Start a program with stdin from /dev/null and its output to `output_fd`; returns its pid.

    Raises:
        OSError: fork failed. A failing exec ends the child with status 127 and a line on `output_fd`.
    """
    parent = os.getpid()
    keep = tuple(keep_fds)
    pid = os.fork()
    if pid:
        return pid
    try:
        set_death_signal(signal.SIGKILL, parent)
        os.setsid()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.execv(arguments[0], list(arguments))
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into the parent's code
        os.write(2, f"cannot run {arguments[0]}: {error}\n".encode())
    finally:
        os._exit(127)
