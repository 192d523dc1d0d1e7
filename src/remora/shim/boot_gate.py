"""Lets only so many microVMs of a node boot at a time.

A boot is all computing, under emulation several seconds of it. Twenty at once on two cores take no less time than two
after two, but every one of them takes all of it, and runs into its deadline: measured, 20 pods failed after 120 s, and
come up within a minute this way. The files are locked, not counted, so that a killed shim gives its turn back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from remora.vmm.contract import Accelerator

#: Boots per processor. With KVM most of a boot waits for disks.
_PER_CPU = {"tcg": 1, "kvm": 4}


@contextlib.contextmanager
def turn(state_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Wait for a turn and hold it; the node's shims share `state_dir`."""
    directory = state_dir / "host"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    count = max(2, (os.cpu_count() or 1) * _PER_CPU[accelerator])
    fds = [
        os.open(directory / f"boot-{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for number in range(count)
    ]
    try:
        if not any(_free(fd) for fd in fds):
            # The kernel keeps the queue; whoever waits for one of them waits as long as for another on average.
            fcntl.flock(fds[os.getpid() % count], fcntl.LOCK_EX)
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
