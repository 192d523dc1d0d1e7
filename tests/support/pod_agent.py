"""The node's agent beside a containerd of the tests, and the classification service that pods run against it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from container_images import busybox_layer, file_layer, python_layer
from containerd_process import Containerd
from remora import paths

IMAGE = "localhost/remora/classify:1"
MODEL = "efficientnet-lite0"
#: An answer may take so long: twenty emulated computers share two processors.
_ANSWER_S = 30.0
_SERVICE = Path(__file__).parents[2] / "examples/classify/service.py"


class Agent:
    """The node's agent on the sockets of this containerd's run-time directory."""

    def __init__(self, containerd: Containerd, state: Path, *options: str) -> None:
        self._containerd = containerd
        self._state = state
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.log = state.with_suffix(".log")

    def start(self) -> None:
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "remora", "agent", "--state", str(self._state), "--ready-fd", str(write_end)]
        command += self._options
        command, environment = self._on_node(command)
        with self.log.open("ab") as log, os.fdopen(read_end) as ready:
            self._process = subprocess.Popen(command, env=environment, stderr=log, pass_fds=[write_end])
            os.close(write_end)
            assert ready.readline(), self.log.read_text()

    def _on_node(self, command: list[str]) -> tuple[list[str], dict[str, str]]:
        node = self._containerd.node
        if node is None:
            return command, {**os.environ, "REMORA_RUNTIME_DIR": str(self._containerd.runtime)}
        return node.within(command), {**os.environ}

    def stop(self, signum: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(30)
            self._process = None

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their names with labels, as Prometheus would read them."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self._containerd.runtime / "metrics.sock"))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")
            answer = sock.makefile("rb").read().decode()
        lines = (line.rpartition(" ") for line in answer.partition("\r\n\r\n")[2].splitlines() if "#" not in line)
        return {name: float(value) for name, _, value in lines if name}

    def ask(self, *arguments: str) -> str:
        command, environment = self._on_node([sys.executable, "-m", "remora", *arguments])
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def add_service_image(containerd: Containerd, scratch: Path) -> None:
    """Give containerd the classification service as an image, with nothing in it but Python."""
    if not (paths.state_dir() / "models" / MODEL).is_dir():
        pytest.skip(f"the model {MODEL} is missing: run remora models build")
    layers = [busybox_layer(), python_layer(scratch), file_layer({"srv/service.py": _SERVICE.read_bytes()})]
    containerd.add_image(IMAGE, layers, Cmd=["python3", "/srv/service.py"], Env=["PATH=/usr/bin:/bin"])


def classify(address: str, picture: bytes, timeout_s: float = 60.0, port: int = 8080) -> list[list[object]]:
    """POST a picture to the service at `address`, again until it answers."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urlopen(Request(f"http://{address}:{port}/classify", data=picture), timeout=20) as answer:
                labels: list[list[object]] = json.loads(answer.read())["labels"]
                return labels
        except (OSError, HTTPError):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


class Caller:
    """Sends a service the same picture again and again, from a thread; an answer that differs from the first is wrong.

    Args:
        patience_s: how long `wait_for` waits for an answer, and `stop` for the last one.
    """

    def __init__(self, address: str, picture: bytes, *, patience_s: float) -> None:
        self.answers = 0
        self.wrong = 0
        #: What came instead of an answer once there had been one.
        self.failures: list[str] = []
        self._url = f"http://{address}:8080/classify"
        self._picture = picture
        self._patience_s = patience_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        first: object = None
        while not self._stopped.is_set():
            try:
                with urlopen(Request(self._url, data=self._picture), timeout=_ANSWER_S) as answer:
                    label = json.loads(answer.read())["labels"][0][0]
            except (OSError, HTTPException) as error:
                if self.answers:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self._stopped.wait(0.1)  # not up yet, or its agent is away
                continue
            first = label if first is None else first
            self.wrong += label != first
            self.answers += 1

    def wait_for(self, answers: int) -> None:
        """Wait until so many answers have come."""
        deadline_s = time.monotonic() + self._patience_s
        while self.answers < answers:
            assert time.monotonic() < deadline_s, f"{self.answers} answers of {answers} from {self._url}"
            time.sleep(0.02)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(self._patience_s)
        assert not self._thread.is_alive()


def photos() -> list[Path]:
    """Return some photographs whose names tell the right label."""
    found = sorted((paths.state_dir() / "photos").glob("*.jpg"))[:5]
    if not found:
        pytest.skip("the labelled photographs are missing: run make demo")
    return found


def labelled_pictures() -> list[tuple[bytes, int]]:
    """Return those photographs with the labels that their names tell."""
    return [(photo.read_bytes(), int(photo.stem.split("_")[1])) for photo in photos()]
