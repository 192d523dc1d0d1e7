"""Small things PID 1 asks of the kernel and of busybox.

Python 3.11 has no mount(2), and importing ctypes costs more under emulation than a busybox process (5 ms), so mounts
go through busybox. Processes are started with posix_spawn: PID 1 forks nothing of itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time

from remora.guest import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Optional, Sequence

    from remora.wire.guest_v1 import Identity

BUSYBOX = "/usr/bin/busybox"
#: Child processes get the default reaction to what Python ignores.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)
_RNDADDENTROPY = 0x40085203  # _IOW('R', 0x03, int[2]), linux/random.h
_RNDRESEEDCRNG = 0x5207  # _IO('R', 0x07)
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def spawn(argv: Sequence[str], stdin: int, stdout: int, stderr: int) -> int:
    """Start a program with these descriptors as its first three and no others; return its pid."""
    actions = [
        (os.POSIX_SPAWN_DUP2, stdin, 0),
        (os.POSIX_SPAWN_DUP2, stdout, 1),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
    ]
    return os.posix_spawn(
        argv[0], list(argv), ENVIRONMENT, file_actions=actions, setsigdef=_DEFAULT_SIGNALS, setsigmask=()
    )


def run(argv: Sequence[str]) -> None:
    """Run a program to its end. Only for short ones: everything waits meanwhile.

    Raises:
        OSError: it failed; the text is what it printed.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        pid = spawn(argv, null(), write_end, write_end)
    finally:
        os.close(write_end)
    printed = b""
    try:
        while part := os.read(read_end, 4096):
            printed += part
    finally:
        os.close(read_end)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        text = printed.decode(errors="replace").strip()
        raise OSError(f"{' '.join(argv)}: {text or 'wait status ' + str(status)}")


def mount(kind: str, source: str, target: str, options: str = "") -> None:
    argv = [BUSYBOX, "mount", "-t", kind]
    if options:
        argv += ["-o", options]
    run([*argv, source, target])


_null = -1


def null() -> int:
    """Return a descriptor of /dev/null that stays open."""
    global _null
    if _null < 0:
        _null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return _null


def read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def kernel_flags() -> List[str]:
    return read_text("/proc/cmdline").split()


def disks() -> Dict[str, str]:
    """Return the device node of each virtio disk by its serial, or by the order that the kernel's arguments name."""
    found: Dict[str, str] = {}
    for flag in kernel_flags():
        if flag.startswith(kernel.DISKS_ARGUMENT):
            # Only the first 26 have one letter; no monitor takes as many.
            names = flag[len(kernel.DISKS_ARGUMENT) :].split(",")
            return {name: f"/dev/vd{chr(ord('a') + index)}" for index, name in enumerate(names)}
    for name in sorted(os.listdir("/sys/block")):
        if name.startswith("vd"):
            serial = _read_or_none(f"/sys/block/{name}/serial")
            if serial:
                found[serial.strip()] = f"/dev/{name}"
    return found


def _read_or_none(path: str) -> Optional[str]:
    try:
        return read_text(path)
    except OSError:
        return None  # a device without this attribute


def reseed(entropy: bytes) -> None:
    """Mix the host's entropy into the kernel's generator and have it used from the next read on.

    Writing to /dev/urandom alone leaves clones of one template with equal random numbers for up to a minute.
    """
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        if entropy:
            header = struct.pack("ii", len(entropy) * 8, len(entropy))
            fcntl.ioctl(fd, _RNDADDENTROPY, header + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG, 0)
    finally:
        os.close(fd)


def set_clock(time_ns: int) -> None:
    if time_ns > 0:
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


def identify(identity: Identity) -> None:
    """Take over what makes this microVM different from its template, but for the name."""
    reseed(bytes(identity.entropy))
    set_clock(identity.time_ns)


def pause_s(seconds: float) -> None:
    """Wait; everything waits meanwhile."""
    time.sleep(seconds)


def unmount(target: str) -> None:
    """Take a mount down, at once for whoever looks; a process that still uses it keeps it for itself."""
    try:
        run([BUSYBOX, "umount", "-l", target])
    except OSError:
        pass  # it was not mounted


def remove_tree(path: str) -> None:
    """Remove a file or a directory with all below it, as far as it is there."""
    if os.path.lexists(path):
        run([BUSYBOX, "rm", "-rf", path])


def loopback_up() -> None:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket.fileno(), _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def restart() -> None:
    """End the VM: the kernel restarts by triple fault (reboot=t), and the VMM exits instead."""
    os.sync()
    write_text("/proc/sysrq-trigger", "b")
