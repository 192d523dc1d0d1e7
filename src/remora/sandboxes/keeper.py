"""The tiny parent of a monitor: it waits, and clears up when the monitor has ended, however that happened.

Fork, not exec: the keeper and the monitor share almost all of their pages with the process that made them, and start in
two milliseconds. Each is in a session of its own, so that a terminal's Ctrl-C reaches only the command in front.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from remora.errors import UnavailableError
from remora.sandboxes import clearing, leash
from remora.sandboxes.launch import Launch
from remora.sandboxes.registry import STATE_FILE
from remora.vmm.process import name_process

LOG_FILE = "monitor.log"


def start_keeper(launch: Launch, fields: dict[str, Any], *, lock_fd: int, leash_fd: int) -> int:
    """Fork the keeper, which forks the monitor; returns the keeper's pid.

    Call it from a process with one thread. `lock_fd` and `leash_fd` stay open here: close them.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        _become_keeper(launch, fields, lock_fd, leash_fd)
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into the parent's code
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(1)


def _become_keeper(launch: Launch, fields: dict[str, Any], lock_fd: int, leash_fd: int) -> NoReturn:
    # What the parent had open is closed by number below; its objects must not close those numbers a second time.
    gc.freeze()
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    _redirect(launch.directory)
    _close_others({lock_fd, leash_fd, *launch.keep_fds})
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGWINCH, signal.SIGALRM):
        signal.signal(signum, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    leash_sock = socket.socket(fileno=leash_fd)
    monitor = os.fork()
    if monitor == 0:
        _become_monitor(launch, fields, leash_sock)
    name_process("remora-keeper")
    # A polite end of the keeper is a polite end of the sandbox.
    signal.signal(signal.SIGTERM, lambda _signum, _frame: os.kill(monitor, signal.SIGTERM))
    _, status = os.waitpid(monitor, 0)
    reason = _reason(status, launch.directory)
    try:
        fields = json.loads((launch.directory / STATE_FILE).read_text())
    except (OSError, ValueError):
        pass  # removed already, or never written: what we were given will do
    clearing.clear(launch.directory, fields, reason=reason)
    if reason:
        leash.send(leash_sock, {"event": "gone", **leash.describe(UnavailableError(reason))})
    os._exit(0)


def _become_monitor(launch: Launch, fields: dict[str, Any], leash_sock: socket.socket) -> NoReturn:
    status = 1
    keeper = os.getppid()
    try:
        name_process("remora-monitor")
        from remora.sandboxes.monitor import Monitor

        monitor = Monitor(launch, fields, leash_sock)
        monitor.run()
        if os.getppid() != keeper:
            # The keeper was killed: its work falls to us.
            clearing.clear(launch.directory, json.loads((launch.directory / STATE_FILE).read_text()))
        status = 0
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into the parent's code
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _reason(status: int, directory: Path) -> str:
    if os.WIFSIGNALED(status):
        return f"the monitor of the microVM was killed by signal {os.WTERMSIG(status)}"
    if os.WEXITSTATUS(status):
        try:
            lines = (directory / LOG_FILE).read_text().strip().splitlines()
        except OSError:
            lines = []
        return f"the monitor of the microVM failed: {lines[-1] if lines else 'no message'}"
    return ""


def _redirect(directory: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    # Python's own objects may be closed or redirected (a captured stderr in tests).
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _close_others(keep: set[int]) -> None:
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 1 << 20)
