"""An agent as an operator runs it: a process of its own, on sockets in a temporary directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from remora import paths
from remora.wire import control_v1, remora_v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client

START_TIMEOUT_S = 30.0
M = TypeVar("M", bound=Message)


def catalogue_directory() -> Path:
    """Return the built catalogue, or skip the test and say how to get it."""
    directory = paths.state_dir() / "models"
    for name in ("identity", "efficientnet-lite0"):
        if not (directory / name / "manifest.toml").is_file():
            pytest.skip(f"the model {name} is missing in {directory}: run `make models`")
    return directory


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition that some other process brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


class AgentProcess:
    """One state directory and its agent, which may be killed and started again."""

    def __init__(self, directory: Path, *, config: str = "", models: Path | None = None) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.socket = directory / "accel.sock"
        self.control = directory / "run" / "control.sock"
        self.metrics = directory / "run" / "metrics.sock"
        self.log_path = directory / "agent.log"
        self.address = f"unix://{self.socket}"
        self._config = directory / "agent.toml"
        self._config.write_text(config)
        self._models = models or directory / "models"
        self._process: subprocess.Popen[bytes] | None = None
        #: What it wrote to its --ready-fd: where it listens.
        self.listening = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def command(self, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "remora", "agent", "--listen", self.address, "--state", str(self.state)),
            *("--config", str(self._config), "--models", str(self._models), *more),
        ]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "REMORA_RUNTIME_DIR": str(self.directory / "run")}

    def start(self, *more: str) -> None:
        ready_r, ready_w = os.pipe()
        with self.log_path.open("ab") as log, os.fdopen(ready_r, "rb") as ready:
            self._process = subprocess.Popen(
                self.command("--ready-fd", str(ready_w), *more),
                pass_fds=[ready_w],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
            os.close(ready_w)
            self.listening = ready.readline().decode().strip()
            if not self.listening:
                self.stop()
                pytest.fail(f"the agent did not start:\n{self.log[-3000:]}")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the agent and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signum)
        try:
            return process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the agent did not end on {signal.Signals(signum).name}")

    def release(self) -> subprocess.Popen[bytes]:
        """Return the process, which is the caller's from now on."""
        process, self._process = self._process, None
        assert process is not None
        return process

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def memory_bytes(self) -> int:
        """Resident memory of the agent itself."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def connect(self, path: Path | None = None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10.0)
        try:
            sock.connect(str(path or self.socket))
        except BaseException:
            sock.close()
            raise
        return sock

    def attach(self, sandbox: str, **values: object) -> Path:
        """Attach a sandbox with a directory of its own; return its socket."""
        directory = self.directory / f"sandbox-{sandbox}"
        directory.mkdir(mode=0o700, exist_ok=True)
        request = control_v1.AttachRequest(sandbox=sandbox, directory=str(directory), **values)
        self.ask("Attach", request, control_v1.Empty)
        return directory / "channel.sock_2048"

    def detach(self, sandbox: str, *, keep_sessions: bool = False) -> None:
        self.ask("Detach", control_v1.DetachRequest(sandbox=sandbox, keep_sessions=keep_sessions), control_v1.Empty)

    def ask(self, method: str, request: Message, answer: type[M]) -> M:
        """Make one call on the control socket."""
        with Client(self.connect(self.control)) as client:
            return client.call(control_v1.SERVICE, method, request, answer, timeout_s=10.0)


@contextmanager
def running_agent(directory: Path, *, config: str = "", models: Path | None = None) -> Iterator[AgentProcess]:
    """Run an agent; at the end it must stop cleanly and leave no socket behind."""
    agent = AgentProcess(directory, config=config, models=models)
    agent.start()
    try:
        yield agent
    finally:
        status = agent.stop()
    assert status == 0, agent.log[-3000:]
    assert not agent.socket.exists()
    assert not agent.control.exists()
    assert "internal error" not in agent.log, agent.log[-3000:]


class Guest:
    """A native connection, one call at a time. `hello` is said on entry."""

    def __init__(self, sock: socket.socket, token: bytes = b"") -> None:
        self._client = Client(sock, max_message_bytes=128 << 20)
        try:
            self.hello = self.call(
                "Hello", remora_v1.HelloRequest(version=1, client="test", token=token), remora_v1.HelloResponse
            )
        except BaseException:
            self._client.close()
            raise

    @property
    def token(self) -> bytes:
        return bytes(self.hello.token)

    def call(self, method: str, request: Message, answer: type[M], timeout_s: float | None = 30.0) -> M:
        return self._client.call(remora_v1.SERVICE, method, request, answer, timeout_s=timeout_s)

    def upload(self, digest: str, data: bytes) -> remora_v1.PutResourceResponse:
        request = remora_v1.PutResourceRequest(digest=digest, offset=0, total_bytes=len(data), data=data)
        return self.call("PutResource", request, remora_v1.PutResourceResponse)

    def stat(self, digest: str) -> remora_v1.StatResourceResponse:
        return self.call("StatResource", remora_v1.StatResourceRequest(digest=digest), remora_v1.StatResourceResponse)

    def load(self, model: str) -> remora_v1.LoadModelResponse:
        return self.call("LoadModel", remora_v1.LoadModelRequest(model=model), remora_v1.LoadModelResponse)

    def infer(self, model: str, value: float = 1.0, request_id: int = 0) -> remora_v1.InferResponse:
        """Run the identity model on one number."""
        return self.call("Infer", identity_request(model, value, request_id), remora_v1.InferResponse)

    def ping(self) -> None:
        self.call("Noop", remora_v1.NoopRequest(data=b"ping"), remora_v1.NoopResponse)

    def close(self) -> None:
        """Drop the connection; the session stays."""
        self._client.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def identity_request(model: str, value: float = 1.0, request_id: int = 0) -> remora_v1.InferRequest:
    """Return a request that the catalogue's identity model answers with the same number."""
    import struct

    tensor = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 1, 1, 1], data=struct.pack("<f", value))
    return remora_v1.InferRequest(model=model, inputs=[tensor], request_id=request_id)
