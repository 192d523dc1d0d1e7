"""A containerd shim without containerd: started, called and ended as containerd would, over its ttrpc socket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from remora.bench.rounds import Series
from remora.errors import FailedPreconditionError, RemoraError
from remora.sandboxes.registry import Registry
from remora.shim import launcher
from remora.wire import containerd as c
from remora.wire.ttrpc.sync import Client

SERVICE = "containerd.task.v2.Task"
NAMESPACE = "remora-bench"
_PROGRAMS = ("dd", "sleep")
_CALL_S = 180.0
_END_S = 10.0


class Started(NamedTuple):
    """What one `start` took, by the process that answered; its server is not counted."""

    cpu_us: float
    wall_us: float
    #: From before `start` to the server's first answer.
    ready_us: float


class Memory(NamedTuple):
    """Of one process, KiB (proc(5), smaps_rollup)."""

    pss: int
    rss: int
    anonymous: int


class Shim:
    """One pod's shim and its bundle. `with` ends it and everything that it holds."""

    def __init__(self, program: Path, bundle: Path, runtime_dir: Path) -> None:
        self.bundle = bundle
        self.id = bundle.name
        self._program = program
        self._runtime_dir = runtime_dir
        self._environment = {
            **os.environ,
            "REMORA_RUNTIME_DIR": str(runtime_dir),
            # Nobody listens there: events are tried some times and dropped, by either shim.
            "TTRPC_ADDRESS": str(runtime_dir / "events.sock"),
        }
        self._log = self._errors = -1
        self.pid = 0
        self.client: Client | None = None

    def __enter__(self) -> Shim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Started:
        """Run `start`.

        Raises:
            FailedPreconditionError: the shim refused; the message has its words.
        """
        # containerd holds this pipe's other end and copies it to its own log; the Go shim waits until it does.
        log = self.bundle / "log"
        os.mkfifo(log, 0o600)
        self._log = os.open(log, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*self._command(), "start"],
            cwd=self.bundle,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        with process.stdout:
            answer = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        if status:
            raise FailedPreconditionError(f"{self._program.name}: {answer.strip()}")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(answer.removeprefix("unix://"))
        self.client = Client(sock)
        # Not by the socket's credentials: they are those of `start`, which made it.
        self.pid = self.call("Connect", c.ProcessRequest(id=self.id)).shim_pid
        ready = time.perf_counter() - begin
        return Started((usage.ru_utime + usage.ru_stime) * 1e6, wall * 1e6, ready * 1e6)

    def _command(self) -> list[str]:
        flags = ["-namespace", NAMESPACE, "-address", "/nonexistent/containerd.sock", "-id", self.id]
        return [str(self._program), *flags, "-publish-binary", "/bin/true", "-bundle", str(self.bundle)]

    def call(self, method: str, request: Any) -> Any:
        assert self.client is not None
        return self.client.call(SERVICE, method, request, c.TASK_METHODS[method][1], timeout_s=_CALL_S)

    def connect(self) -> None:
        self.call("Connect", c.ProcessRequest(id=self.id))

    def state(self) -> None:
        self.call("State", c.ProcessRequest(id=self.id))

    def run(self, stdout: str = "") -> dict[str, float]:
        """Create and start the container; returns how long each took, milliseconds."""
        begin = time.perf_counter()
        # The Go shim wants both or neither.
        stderr = ""
        if stdout:
            stderr = str(self.bundle / "stderr")
            os.mkfifo(stderr, 0o600)
            self._errors = os.open(stderr, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.call("Create", c.CreateTaskRequest(id=self.id, bundle=str(self.bundle), stdout=stdout, stderr=stderr))
        created = time.perf_counter()
        self.call("Start", c.ProcessRequest(id=self.id))
        return {
            "create_ms": round((created - begin) * 1000, 1),
            "start_ms": round((time.perf_counter() - created) * 1000, 1),
        }

    def record(self) -> dict[str, Any]:
        """Return what our shim has written down about its pod."""
        records = Registry(self._runtime_dir).all()
        return next(record.fields for record in records if record.fields["container"] == self.id)

    def memory(self) -> Memory:
        found = {}
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, amount, *_ = line.split()
            found[name.rstrip(":")] = int(amount)
        return Memory(found["Pss"], found["Rss"], found["Anonymous"])

    def close(self) -> None:
        if self.client is not None:
            for method, request in (
                ("Kill", c.KillRequest(id=self.id, signal=signal.SIGKILL, all=True)),
                ("Wait", c.ProcessRequest(id=self.id)),
                ("Delete", c.ProcessRequest(id=self.id)),
                ("Shutdown", c.ShutdownRequest(id=self.id)),
            ):
                # What there is none of, and a server that has ended.
                with contextlib.suppress(RemoraError):
                    self.call(method, request)
            self.client.close()
            self.client = None
        deadline_s = time.monotonic() + _END_S
        while self.pid and _runs(self.pid):
            if time.monotonic() > deadline_s:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        for fd in (self._log, self._errors):
            if fd >= 0:
                os.close(fd)
        self._log = self._errors = -1
        subprocess.run(
            [*self._command(), "delete"], cwd=self.bundle, env=self._environment, capture_output=True, check=False
        )


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def programs(directory: Path) -> dict[str, Path]:
    """Return both shims' programs, ours written into `directory`.

    Raises:
        FailedPreconditionError: what this comparison needs is not installed.
    """
    for name, package in (("containerd-shim-runc-v2", "containerd"), ("runc", "runc")):
        if shutil.which(name) is None:
            raise FailedPreconditionError(f"{name} is not installed", fix=f"install it: apt-get install {package}")
    if os.geteuid():
        raise FailedPreconditionError("shims run as root", fix="run this as root")
    return {"remora": launcher.write(directory), "runc": Path(str(shutil.which("containerd-shim-runc-v2")))}


class Bundles:
    """Makes bundles below a directory, as `runc spec` has them; the root holds `dd` and `sleep` of this host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._root = directory / "rootfs"
        for program in _PROGRAMS:
            self._add(Path(str(shutil.which(program))), f"bin/{program}")
        subprocess.run(["runc", "spec", "--bundle", str(directory)], check=True)
        self._spec: dict[str, Any] = json.loads((directory / "config.json").read_text())

    def _add(self, program: Path, name: str) -> None:
        """Copy a program into the root, with its libraries."""
        listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
        libraries = [Path(word) for word in listed.split() if word.startswith("/")]
        for source, inside in [(program, name), *((path, str(path).lstrip("/")) for path in libraries)]:
            target = self._root / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def make(self, kind: str, *command: str) -> Path:
        self._count += 1
        bundle = self._directory / f"{kind}-{os.getpid()}-{self._count}"
        bundle.mkdir()
        spec = {
            **self._spec,
            "process": {**self._spec["process"], "terminal": False, "args": [f"/bin/{command[0]}", *command[1:]]},
            "root": {"path": str(self._root), "readonly": True},
            "annotations": {"io.remora.memory": "256M"},
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle


@contextlib.contextmanager
def several(make: Callable[[], Shim], count: int) -> Iterator[list[Shim]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(make()) for _ in range(count)]


def as_series(samples: list[float]) -> Series:
    return Series([[sample] for sample in samples])
