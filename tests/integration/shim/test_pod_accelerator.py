"""Pods and the node agent: a classification service behind a pod's address, under the pod's own identity."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from container_images import busybox_layer, file_layer, python_layer
from containerd_process import Containerd
from cri_client import Pod
from remora import paths

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]
IMAGE = "localhost/remora/classify:1"
SERVICE = Path(__file__).parents[3] / "examples/classify/service.py"
MODEL = "efficientnet-lite0"


class Agent:
    """The node's agent on the sockets of this containerd's run-time directory."""

    def __init__(self, containerd: Containerd, state: Path) -> None:
        self._containerd = containerd
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None
        self.log = state.with_suffix(".log")

    def start(self) -> None:
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "remora", "agent", "--state", str(self._state), "--ready-fd", str(write_end)]
        environment = {**os.environ, "REMORA_RUNTIME_DIR": str(self._containerd.runtime)}
        with self.log.open("ab") as log, os.fdopen(read_end) as ready:
            self._process = subprocess.Popen(command, env=environment, stderr=log, pass_fds=[write_end])
            os.close(write_end)
            assert ready.readline(), self.log.read_text()

    def stop(self, signum: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(30)
            self._process = None

    def ask(self, *arguments: str) -> str:
        environment = {**os.environ, "REMORA_RUNTIME_DIR": str(self._containerd.runtime)}
        command = [sys.executable, "-m", "remora", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def agent(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    if not (paths.state_dir() / "models" / MODEL).is_dir():
        pytest.skip(f"the model {MODEL} is missing: run remora models build")
    scratch = tmp_path_factory.mktemp("agent")
    layers = [busybox_layer(), python_layer(scratch), file_layer({"srv/service.py": SERVICE.read_bytes()})]
    containerd.add_image(IMAGE, layers, Cmd=["python3", "/srv/service.py"], Env=["PATH=/usr/bin:/bin"])
    one = Agent(containerd, scratch / "state")
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def service(containerd: Containerd, agent: Agent) -> Iterator[Pod]:
    annotations = {"io.remora.label.tier": "gold"}
    with containerd.cri.run_pod("classify", namespace="vision", annotations=annotations) as pod:
        pod.start(image=IMAGE, env={"PYTHONUNBUFFERED": "1"})
        yield pod


def classify(pod: Pod, picture: bytes, timeout_s: float = 60.0) -> list[list[object]]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urlopen(Request(f"http://{pod.ip}:8080/classify", data=picture), timeout=20) as answer:
                labels: list[list[object]] = json.loads(answer.read())["labels"]
                return labels
        except (OSError, HTTPError):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


def photos() -> list[Path]:
    found = sorted((paths.state_dir() / "photos").glob("*.jpg"))[:5]
    if not found:
        pytest.skip("the labelled photographs are missing: run make demo")
    return found


def test_a_pods_service_classifies_pictures_over_its_address(service: Pod) -> None:
    right = 0
    for photo in photos():
        labels = classify(service, photo.read_bytes())
        right += labels[0][0] == int(photo.stem.split("_")[1])
    assert right >= 4


def test_the_agent_knows_the_pod_by_namespace_and_name(service: Pod, agent: Agent) -> None:
    classify(service, photos()[0].read_bytes())
    sessions = agent.ask("sessions", "--json")
    assert f"vision.classify.{service.id[:8]}" in sessions


def test_the_pod_has_its_accelerator_again_after_the_agent_was_killed(service: Pod, agent: Agent) -> None:
    picture = photos()[0].read_bytes()
    before = classify(service, picture)
    agent.stop(signal.SIGKILL)
    agent.start()
    assert classify(service, picture)[0][0] == before[0][0]


def test_a_pod_may_have_no_accelerator(containerd: Containerd, agent: Agent) -> None:
    with containerd.cri.run_pod("plain", annotations={"io.remora.accelerator": "false"}) as pod:
        script = "import remora; remora.connect().ping()"
        asked = pod.start("python3", "-c", script, image=IMAGE, env={"REMORA_TIMEOUT": "2"})
        assert asked.wait().exit_code == 1
        assert "UnavailableError" in asked.output()
