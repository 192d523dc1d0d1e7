"""Starts a program that cannot outlive the thread that started it, and looks after a monitor that was started so.

`subprocess` would do, but costs 12 ms of import, and its `preexec_fn` allocates between fork and exec all the same.
Here the child does five system calls and execs.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from remora.errors import FailedPreconditionError
from remora.vmm.contract import Ended

_PR_SET_PDEATHSIG = 1
#: sched.h, as in unshare(2).
_CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
#: How much of what a monitor and its guest's console write is kept for error messages.
CONSOLE_BYTES = 16384
_libc = ctypes.CDLL(None, use_errno=True)


def set_death_signal(signum: int, parent: int) -> None:
    """Have the kernel send `signum` to this process when its parent's thread ends; exits if it has ended already.

    See prctl(2), PR_SET_PDEATHSIG: the setting survives execve, and ends with a change of the user.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    # getppid(2) says 0 in the first process of a PID namespace, but /proc is still the one outside.
    if (os.getppid() or _parent_outside()) != parent:
        os._exit(1)


def _parent_outside() -> int:
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def name_process(name: str) -> None:
    """Set what `ps` and `top` show as this process's command (15 characters)."""
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])
    except OSError:
        pass  # only a label


def find_program(name: str) -> str | None:
    """Return the path of a program, or None if it is not on PATH."""
    # Not shutil.which: its import costs a clone 6 ms.
    for directory in os.get_exec_path():
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def first_line(binary: str, *arguments: str) -> str:
    """Return the first line that a program prints on standard output; empty if it prints none or cannot run."""
    import subprocess

    try:
        done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0]


def version_of(binary: str, pattern: str, product: str) -> str:
    """Return what `pattern`'s first group finds in the line that a program answers `--version` with.

    Raises:
        FailedPreconditionError: nothing.
    """
    match = re.search(pattern, first_line(binary, "--version"))
    if match is None:
        raise FailedPreconditionError(f"{binary} does not tell its version", fix=f"reinstall {product}")
    return match[1]


def spawn(
    arguments: Sequence[str],
    *,
    keep_fds: Iterable[int] = (),
    output_fd: int,
    directory: Path | None = None,
    fork: Callable[[], int] = os.fork,
    network: bool = True,
) -> int:
    """Start a program with stdin from /dev/null and its output to `output_fd`; returns its pid.

    Args:
        directory: Where it runs; None: where the caller does.
        fork: How; `fork_pid_namespace` to make it the first process of a namespace.
        network: False: in a network and an IPC namespace with nothing in them (root only).

    Raises:
        OSError: fork failed. A failing exec ends the child with status 127 and a line on `output_fd`.
    """
    parent = os.getpid()
    keep = tuple(keep_fds)
    pid = fork()
    if pid:
        return pid
    try:
        set_death_signal(signal.SIGKILL, parent)
        if not network and _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC):
            raise OSError(ctypes.get_errno(), "it gets no network namespace")
        os.setsid()
        if directory is not None:
            os.chdir(directory)
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


def fork_pid_namespace() -> int:
    """Fork, the child being the first process of a new PID namespace: whatever ends it ends all processes in there.

    Needs root. Only this thread is concerned, and only until the call returns (pid_namespaces(7)).
    """
    ours = os.open("/proc/thread-self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), "no PID namespace can be made")
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                _libc.setns(ours, _CLONE_NEWPID)
        return pid
    finally:
        os.close(ours)


class MonitorProcess:
    """A virtual machine monitor's process and its console: what every driver's machine has in common.

    `kill` and `reap` may come from another thread than the rest.
    """

    def __init__(self, pid: int, console: socket.socket) -> None:
        self._pid = pid
        self._console = console
        self._console.setblocking(False)
        self._console_tail: deque[bytes] = deque()
        self._console_bytes = 0
        self._ended: Ended | None = None

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def console(self) -> socket.socket:
        return self._console

    def read_console(self) -> bool:
        try:
            data = self._console.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._console_tail.append(data)
        self._console_bytes += len(data)
        while self._console_bytes - len(self._console_tail[0]) >= CONSOLE_BYTES:
            self._console_bytes -= len(self._console_tail.popleft())
        return bool(data)

    def console_text(self) -> str:
        text = b"".join(self._console_tail).decode("utf-8", "replace")
        # SeaBIOS clears the screen by escape sequences, and a guest may write any: whoever reads an error message has a
        # terminal that would obey them.
        text = re.sub(r"\x1b(\[[0-9;=?]*[a-zA-Z]|c)", "", text)
        return "".join(one for one in text if one.isprintable() or one in "\n\t")

    def kill(self) -> None:
        if self._ended is None:
            try:
                os.kill(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself and has been reaped by the other thread

    def reap(self) -> Ended | None:
        if self._ended is None:
            self._wait(os.WNOHANG)
        return self._ended

    def close(self) -> None:
        self.kill()
        if self._ended is None:
            self._wait(0)
        self._console.close()

    def _wait(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self._pid, options)
        except ChildProcessError:
            pid, status = self._pid, 0
        if pid:
            while self._console.fileno() >= 0 and self.read_console() and self._console_ready():
                pass
            killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            exit_status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
            self._ended = Ended(exit_status, killed_by, self.console_text())

    def _console_ready(self) -> bool:
        try:
            return bool(self._console.recv(1, socket.MSG_PEEK))
        except OSError:
            return False
