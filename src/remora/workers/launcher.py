"""Starts a worker process with nothing around it.

bubblewrap gives it new namespaces of every kind (no network, no other process, its own user), an empty read-only root
with read-only binds of the interpreter, the packages it imports and the shared libraries, an empty directory to be in,
and no capabilities. Two sockets are its only way out. `worker_argv` is pure; tests read it without starting anything.

The worker dies with the agent: bubblewrap sets the parent-death signal, and both sockets end.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from remora.errors import FailedPreconditionError, RemoraError
from remora.workers import seccomp
from remora.workers.protocol import library_path
from remora.workers.settings import WorkerSettings

#: The worker's own user and group inside its namespace: nobody.
_UID = 65534
_IMPORTS = ("remora", "numpy", "onnx", "onnxruntime", "PIL", "simplejpeg", "ai_edge_litert", "torch")
#: ONNX Runtime reads these to know the processor; they hold no secret.
_PROCESSOR = ("/proc/cpuinfo", "/sys/devices/system/cpu")
BOOT = "import sys; sys.path[:0] = sys.argv[1].split(':'); from remora.workers.main import main; main(sys.argv[2:])"
BOOT_LIBRARY = BOOT.replace("workers.main", "workers.library_main")
_FIX_BWRAP = "apt-get install bubblewrap, or set worker confinement to 'none' if you accept unconfined workers"
_FIX_USERNS = (
    "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
    "kernel.apparmor_restrict_unprivileged_userns), or set worker confinement to 'none' if you accept that"
)


@dataclass(frozen=True)
class Runtime:
    """Where this Python and what a worker imports lie."""

    python: str
    stdlib: tuple[str, ...]
    #: The worker's import path.
    packages: tuple[str, ...]
    #: What the worker sees of it: a source tree holds more than our package.
    package_binds: tuple[str, ...]
    libraries: tuple[str, ...]
    #: bubblewrap can forbid further user namespaces in a worker. Container runtimes mount /proc/sys read-only, where it
    #: cannot; the worker's system call filter then stands alone.
    closes_userns: bool = True
    #: Devices that its packages open: PyTorch seeds its generator from one, and takes nothing else for it.
    devices: tuple[str, ...] = ()


@cache
def runtime() -> Runtime:
    """Find them for the running interpreter."""
    parents: dict[str, list[str]] = {}
    for name in _IMPORTS:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            parents.setdefault(str(Path(place).parent), []).append(place)
    binds = [places[0] if len(places) == 1 else parent for parent, places in parents.items()]
    names = ("stdlib", "platstdlib")
    stdlib = tuple(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))
    return Runtime(
        python=os.path.realpath(sys.executable),
        stdlib=stdlib,
        packages=tuple(parents),
        package_binds=tuple(binds),
        libraries=_libraries(stdlib),
        closes_userns=_sysctls_are_writable(),
        devices=("/dev/urandom",) if importlib.util.find_spec("torch") is not None else (),
    )


def _sysctls_are_writable() -> bool:
    try:
        return not os.statvfs("/proc/sys/user").f_flag & os.ST_RDONLY
    except OSError:
        return True  # bubblewrap says what is wrong


def _libraries(stdlib: Sequence[str]) -> tuple[str, ...]:
    """Return the directories of the shared libraries that this process has mapped, and the dynamic linker."""
    found: dict[str, None] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if ".so" in path and not any(f"/{path}".startswith(place) for place in stdlib):
                found[os.path.dirname(os.path.realpath(f"/{path}"))] = None
    system = [place for place in found if place.startswith(("/usr/lib", "/lib", "/usr/local/lib"))]
    python_lib = sysconfig.get_config_var("LIBDIR")
    own = [python_lib] if python_lib and sysconfig.get_config_var("Py_ENABLE_SHARED") else []
    linkers = [path for path in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1") if os.path.exists(path)]
    cache_file = [path for path in ("/etc/ld.so.cache",) if os.path.exists(path)]
    return tuple(dict.fromkeys((*system, *own, *linkers, *cache_file)))


def worker_argv(
    settings: WorkerSettings,
    found: Runtime,
    arguments: Sequence[str],
    info_fd: int | None,
    libraries: Sequence[int] = (),
) -> list[str]:
    """Return the command line of a worker; one for a library gets its files, open in this process, as `library_path`s.

    bubblewrap copies them into the worker's own memory: there is no path by which it could reach the store.
    """
    boot = BOOT_LIBRARY if libraries else BOOT
    python = [found.python, "-I", "-S", "-B", "-c", boot, ":".join(found.packages), *arguments]
    if settings.confinement == "none":
        return python
    # By its path: looked for along PATH by each start otherwise.
    program = shutil.which("bwrap") or "bwrap"
    argv = [program, "--unshare-all", "--unshare-user", *(["--disable-userns"] if found.closes_userns else [])]
    argv += ["--uid", str(_UID), "--gid", str(_UID), "--hostname", "worker", "--cap-drop", "ALL"]
    argv += ["--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    for name, value in environment().items():
        argv += ["--setenv", name, value]
    for path in (found.python, *found.stdlib, *found.package_binds, *found.libraries):
        argv += ["--ro-bind", path, path]
    for path in _PROCESSOR:
        argv += ["--ro-bind-try", path, path]
    for path in (*found.devices, *gpu_devices(settings)) if not libraries else ():
        argv += ["--dev-bind-try", path, path]
    for number, fd in enumerate(libraries):
        argv += ["--perms", "0500", "--ro-bind-data", str(fd), library_path(number)]
    argv += ["--dir", "/empty", "--chdir", "/empty", "--remount-ro", "/"]
    if info_fd is not None:
        argv += ["--info-fd", str(info_fd)]
    return [*argv, "--", *python]


def gpu_devices(settings: WorkerSettings) -> list[str]:
    """Return the device nodes that a worker needs, none where it computes on the CPU."""
    return [] if settings.device == "cpu" else sorted(str(path) for path in Path("/dev").glob("nvidia*"))


def environment() -> dict[str, str]:
    """Return a worker's whole environment."""
    return {
        "ORT_DISABLE_TELEMETRY": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "4",
        # Keep the buffers of one picture for the next: fresh pages for each cost a quarter of the preprocessing.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
        "LANG": "C.UTF-8",
    }


def probe(settings: WorkerSettings) -> None:
    """Make sure that workers can be confined as the settings ask.

    Raises:
        FailedPreconditionError: says what to do.
    """
    if settings.confinement == "none":
        return
    if shutil.which("bwrap") is None:
        raise FailedPreconditionError("workers are confined with bubblewrap, which is not installed", fix=_FIX_BWRAP)
    argv = ["bwrap", "--unshare-all", "--unshare-user", *(["--disable-userns"] if _sysctls_are_writable() else [])]
    argv += ["--cap-drop", "ALL", "--ro-bind", "/", "/"]
    try:
        done = subprocess.run([*argv, "--", "/bin/true"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedPreconditionError(f"bubblewrap does not run: {error}", fix=_FIX_BWRAP) from error
    if done.returncode != 0:
        reason = done.stderr.strip().partition("\n")[0] or f"exit status {done.returncode}"
        raise FailedPreconditionError(f"bubblewrap cannot make a namespace here: {reason}", fix=_FIX_USERNS)


def sweep() -> int:
    """Kill what an agent that was killed at the wrong moment left; returns how many processes.

    An agent's death ends bubblewrap, and that its child; but not a child that still waits to be let go (a window of
    about a millisecond at each start). Such a child is one of ours without bubblewrap for a parent, and the first of
    its PID namespace: the bubblewrap of an agent in a container has neither, but is in a namespace of others.
    """
    killed = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            command = Path("/proc", entry, "cmdline").read_bytes()
            program = command.partition(b"\0")[0].rpartition(b"/")[2]
            if program != b"bwrap" or b"from remora.workers." not in command:
                continue
            status = dict(line.split(":", 1) for line in Path("/proc", entry, "status").read_text().splitlines())
            parent = Path("/proc", status["PPid"].strip(), "comm").read_text().strip()
            # The first of its namespace: bubblewrap itself, of an agent in a container, has two numbers as well.
            numbers = status["NSpid"].split()
            if len(numbers) > 1 and numbers[-1] == "1" and parent != "bwrap":
                os.kill(int(entry), signal.SIGKILL)
                killed += 1
        except OSError:
            continue  # gone meanwhile, or another user's
    return killed


def why_no_libraries(settings: WorkerSettings) -> RemoraError | None:
    """Return what keeps this node from running tenants' libraries; models would run here all the same."""
    if settings.confinement != "bubblewrap":
        return FailedPreconditionError(
            "libraries run in confined workers only, and workers.confinement is 'none'",
            fix="ask the operator for workers.confinement = 'bubblewrap'",
        )
    if platform.machine() not in seccomp.MACHINES:
        return FailedPreconditionError(
            f"libraries run behind a system call filter only, and there is none for {platform.machine()}",
            fix=f"use a node of {' or '.join(seccomp.MACHINES)}",
        )
    return None


def launch(
    settings: WorkerSettings,
    arguments: Sequence[str],
    pass_fds: Sequence[int],
    stderr: int,
    info_fd: int | None,
    *,
    prefix: Sequence[str] = (),
    libraries: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a worker process; `prefix` is what enters its cell.

    Raises:
        FailedPreconditionError: the program could not be started.
    """
    argv = [*prefix, *worker_argv(settings, runtime(), arguments, info_fd, libraries)]
    fds = [*pass_fds, *libraries] if info_fd is None else [*pass_fds, *libraries, info_fd]
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=fds,
            env=environment() if settings.confinement == "none" else {"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,  # a terminal's Ctrl-C is for the agent, which then ends its workers in order
        )
    except OSError as error:
        raise FailedPreconditionError(f"cannot start {argv[0]}: {error.strerror}", fix=_FIX_BWRAP) from error
