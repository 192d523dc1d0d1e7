"""Does KVM work here? Only a guest that boots can tell.

A device node proves nothing: on hosts with a software KVM `/dev/kvm` opens and makes a vCPU, and then QEMU aborts or
the guest's kernel hangs. So a real kernel is started with no root file system and must come as far as its panic about
that, within a deadline. The answer holds until the host boots again and is kept in a file.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from pathlib import Path

from remora.vmm.contract import Accelerator
from remora.vmm.hostcache import cached
from remora.vmm.process import spawn
from remora.vmm.qemu import find_binary

TIMEOUT_S = 10.0
#: What a kernel says that has come up and finds no root file system.
_BOOTED = b"Kernel panic - not syncing: VFS"


def accelerator(kernel: Path, cache_dir: Path) -> Accelerator:
    """Return what to run guests with: `kvm` if a guest booted with it since the host came up, else `tcg`."""
    if os.environ.get("REMORA_ACCELERATOR") in ("kvm", "tcg"):
        return "kvm" if os.environ["REMORA_ACCELERATOR"] == "kvm" else "tcg"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    works = cached(cache_dir, "kvm", lambda: boots(kernel, "kvm"))
    return "kvm" if works else "tcg"


def boots(kernel: Path, accel: Accelerator, *, timeout_s: float = TIMEOUT_S, binary: str | None = None) -> bool:
    """Boot `kernel` alone and report whether it came up within `timeout_s`."""
    console, console_child = socket.socketpair()
    with console:
        with console_child:
            pid = spawn(
                (
                    binary or find_binary(),
                    *("-machine", "microvm,x-option-roms=off", "-accel", accel),
                    *("-cpu", "host" if accel == "kvm" else "max"),
                    *("-m", "64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *("-kernel", str(kernel), "-append", "console=ttyS0 panic=-1 reboot=t"),
                    *("-chardev", f"socket,id=console,fd={console_child.fileno()}", "-serial", "chardev:console"),
                ),
                keep_fds=(console_child.fileno(),),
                output_fd=console_child.fileno(),
            )
        try:
            return _says(console, _BOOTED, time.monotonic() + timeout_s)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _says(console: socket.socket, words: bytes, deadline_s: float) -> bool:
    seen = b""
    while words not in seen:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([console], [], [], left_s)[0]:
            return False
        try:
            data = console.recv(4096)
        except ConnectionResetError:
            return False
        if not data:
            return False
        seen = seen[-len(words) :] + data
    return True
