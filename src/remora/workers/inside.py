"""What every worker does to itself before it does anything else, whether bubblewrap is around it or not."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
import threading
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def confine_self(open_files: int, processes: int) -> None:
    """Die with the parent, gain no privileges, and keep to limits.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    if os.getcwd() != "/empty":  # not in bubblewrap: a directory that is gone is empty, and stays so
        os.chdir(tempfile.mkdtemp(prefix="remora-worker-"))
        os.rmdir(os.getcwd())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the agent's to handle
    threading.excepthook = _end


def bound_memory(size_bytes: int) -> None:
    """Bound this process's address space; 0: no bound."""
    if size_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def _end(args: threading.ExceptHookArgs) -> NoReturn:
    """End the process with a thread: one thread less, unnoticed, would be worse than a restart."""
    sys.excepthook(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    sys.stderr.flush()
    os._exit(70)
