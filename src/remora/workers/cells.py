"""What the kernel keeps of a worker besides its namespaces: control groups, and a user of its own.

A worker's user matters twice: whoever got out of all else would be nobody on this host, and Linux exempts root from the
bound on processes (RLIMIT_NPROC). Only root may give users away, and the user must be able to read the interpreter and
the packages; where either is not so, workers run as the agent's user, which bubblewrap shows them as nobody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import count

from remora.errors import FailedPreconditionError
from remora.workers import cgroups, launcher
from remora.workers.cgroups import Bounds, Group, Groups
from remora.workers.settings import WorkerSettings

#: Users that no account, container or systemd service has (systemd's UIDS-GIDS.md: free from 1879048192 on).
_FIRST_UID = 1_900_000_000
_UIDS_PER_AGENT = 1024
_AGENTS = 65536
_PROBE_S = 20
#: Enters control groups while it may, then becomes what it was asked to.
_ENTER = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 71; shift; done; shift; exec "$@"'


class Cell:
    """One worker's user and groups. `prefix` is a command line that enters them and starts what follows it."""

    def __init__(self, name: str = "", uid: int | None = None, group: Group | None = None) -> None:
        self.name = name
        self.uid = uid
        self._group = group

    def prefix(self) -> list[str]:
        enter = ["/bin/sh", "-c", _ENTER, "sh", *self._group.join_files, "--"] if self._group is not None else []
        user = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--inh-caps=-all", "--"]
        return enter if self.uid is None else [*enter, *user]

    def bound(self, bounds: Bounds) -> None:
        """Set what the worker may use.

        Raises:
            FailedPreconditionError: the kernel refuses.
        """
        if self._group is None:
            return
        try:
            self._group.bound(bounds)
        except OSError as error:
            raise FailedPreconditionError(
                f"the bounds of a worker cannot be set: {error.filename}: {error.strerror}",
                fix="set workers.cgroups = false if resource limits alone are enough for you",
            ) from error

    def verdict(self) -> str:
        """Return why the kernel ended the worker, if it was for one of the bounds."""
        out = self._group is not None and self._group.out_of_memory()
        return "it used more memory than it may (workers.tenant_memory_bytes or shared_memory_bytes)" if out else ""

    def remove(self) -> bool:
        """Remove the groups; False while processes are left in them."""
        return self._group is None or self._group.remove()


class Cells:
    """Makes cells as this machine and the agent's rights allow.

    `report` says what is missing, for the log and for `remora agent status`.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        confined = settings.confinement == "bubblewrap"
        found = cgroups.detect() if confined and settings.cgroups else "switched off"
        self._groups: Groups | None = found if isinstance(found, Groups) else None
        self.own_users = confined and settings.own_users and _users_work(settings)
        self._numbers = count()
        self.report: dict[str, str] = {
            "cgroups": f"version {self._groups.version}: {', '.join(self._groups.controllers)}"
            if self._groups is not None
            else f"none ({found})",
            "users": "one for each worker" if self.own_users else "the agent's own",
        }

    def make(self, worker: str) -> Cell:
        """
        Raises:
            FailedPreconditionError: the control groups cannot be made.
        """
        number = next(self._numbers)
        try:
            group = self._groups.create(f"{worker}-{number}") if self._groups is not None else None
        except OSError as error:
            raise FailedPreconditionError(
                f"a worker's control group cannot be made: {error.filename}: {error.strerror}",
                fix="set workers.cgroups = false if resource limits alone are enough for you",
            ) from error
        return Cell(worker, _uid(number) if self.own_users else None, group)

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()


def _uid(number: int) -> int:
    return _FIRST_UID + os.getpid() % _AGENTS * _UIDS_PER_AGENT + number % _UIDS_PER_AGENT


def _users_work(settings: WorkerSettings) -> bool:
    """True if a worker's interpreter starts as a user of its own, in the confinement that it will have."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    argv: Sequence[str] = launcher.worker_argv(settings, launcher.runtime(), [], None)
    code = "import sys; sys.path[:0] = sys.argv[1].split(':'); import remora"
    argv = [code if word == launcher.BOOT else word for word in argv]
    try:
        done = subprocess.run(
            [*Cell("probe", _uid(0)).prefix(), *argv], capture_output=True, timeout=_PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
