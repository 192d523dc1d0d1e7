"""Lists of the system calls a worker may make once its code is loaded; every other one fails with EPERM.

Computing needs memory, threads, clocks and the sockets that are already open. It needs no program start, no new
process, no new socket, no ptrace, io_uring, bpf, mount or namespace: those are what an attacker inside the worker would
reach for in the kernel.

Where models run, `openat` stays, as their runtimes look at the processor and the read-only binds; there is nothing else
to open. A worker for a tenant's own library has two lists: `loading` opens files and lets a filter be added; `library`
follows once the library is loaded, and opens, looks up and lists nothing.

`clone` passes only for threads. `clone3` keeps its flags in memory, where a filter cannot look: it gets ENOSYS, upon
which glibc uses `clone`. The filter is classic BPF, 8 bytes an instruction (linux/filter.h, linux/seccomp.h).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_SET_MODE_FILTER = 1
_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000

#: name -> number, per machine (asm/unistd_64.h of x86; asm-generic/unistd.h).
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "readv": 19,
    "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "mincore": 27, "madvise": 28, "dup": 32,
    "nanosleep": 35, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "getsockopt": 55, "exit": 60, "uname": 63, "fcntl": 72, "getcwd": 79, "readlink": 89,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204,
    "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "tgkill": 234, "openat": 257, "newfstatat": 262,
    "readlinkat": 267, "set_robust_list": 273, "get_robust_list": 274, "pipe2": 293, "prlimit64": 302, "getcpu": 309,
    "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "futex_waitv": 449,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "dup": 23, "fcntl": 25, "ioctl": 29, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61,
    "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
    "set_robust_list": 99, "get_robust_list": 100, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
    "clock_nanosleep": 115, "sched_setaffinity": 122, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "uname": 160, "getrlimit": 163, "getrusage": 165, "getcpu": 168, "gettimeofday": 169,
    "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "getsockname": 204, "sendto": 206, "recvfrom": 207, "getsockopt": 209, "shutdown": 210, "sendmsg": 211,
    "recvmsg": 212, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "mincore": 232,
    "madvise": 233, "prlimit64": 261, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
}  # fmt: skip
#: machine -> (AUDIT_ARCH, allowed, clone, clone3, seccomp)
MACHINES = {"x86_64": (0xC000003E, _X86_64, 56, 435, 317), "aarch64": (0xC00000B7, _AARCH64, 220, 435, 277)}
#: What a library's worker needs until the library is loaded, and what it never needs.
_UNTIL_LOADED = frozenset(
    ("openat", "access", "readlink", "readlinkat", "newfstatat", "statx", "getdents64", "getcwd", "pread64", "lseek",
     "getsockname", "getsockopt", "prlimit64", "uname")
)  # fmt: skip
_FOR_MODELS = frozenset(("ioctl", "dup", "pipe2", "mincore", "sched_setaffinity"))
LISTS = ("models", "loading", "library")


def allowed(machine: str, kind: str) -> dict[str, int]:
    """Return the system calls of one of `LISTS` with their numbers; `clone` is not among them.

    Raises:
        KeyError: there is no list for that machine.
    """
    _arch, names, _clone, _clone3, seccomp = MACHINES[machine]
    if kind == "models":
        return names
    left_out = _FOR_MODELS | _UNTIL_LOADED if kind == "library" else _FOR_MODELS
    kept = {name: number for name, number in names.items() if name not in left_out}
    return kept if kind == "library" else {**kept, "seccomp": seccomp}


def program(machine: str, kind: str = "models") -> bytes:
    """Return the filter for a machine.

    Raises:
        KeyError: there is no list for it.
    """
    arch, _names, clone, clone3, _seccomp = MACHINES[machine]
    steps = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    numbers = sorted(allowed(machine, kind).values())
    # Each comparison jumps over the rest of the list and the refusal behind it.
    steps += [(_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    steps += [(_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def install(kind: str = "models") -> bool:
    """Filter all threads of this process and all it will start, for good; False on a machine without a list.

    `PR_SET_NO_NEW_PRIVS` must be set. Filters add up: a call passes if each of them allows it.

    Raises:
        OSError: the kernel refused the filter.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        return False
    steps = program(machine, kind)
    filtered = _Program(len(steps) // 8, steps)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(MACHINES[machine][4], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(filtered)) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused the worker's system call filter")
    return True
