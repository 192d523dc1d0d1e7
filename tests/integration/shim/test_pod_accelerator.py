"""Pods and the node agent: a classification service behind a pod's address, under the pod's own identity."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from containerd_process import Containerd
from cri_client import Pod
from pod_agent import IMAGE, Agent, add_service_image, classify, photos

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def agent(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    scratch = tmp_path_factory.mktemp("agent")
    add_service_image(containerd, scratch)
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


def test_a_pods_service_classifies_pictures_over_its_address(service: Pod) -> None:
    right = 0
    for photo in photos():
        labels = classify(service.ip, photo.read_bytes())
        right += labels[0][0] == int(photo.stem.split("_")[1])
    assert right >= 4


def test_the_agent_knows_the_pod_by_namespace_and_name(service: Pod, agent: Agent) -> None:
    classify(service.ip, photos()[0].read_bytes())
    sessions = agent.ask("sessions", "--json")
    assert f"vision.classify.{service.id[:8]}" in sessions


def test_the_pod_has_its_accelerator_again_after_the_agent_was_killed(service: Pod, agent: Agent) -> None:
    picture = photos()[0].read_bytes()
    before = classify(service.ip, picture)
    agent.stop(signal.SIGKILL)
    agent.start()
    assert classify(service.ip, picture)[0][0] == before[0][0]


def test_a_pod_may_have_no_accelerator(containerd: Containerd, agent: Agent) -> None:
    with containerd.cri.run_pod("plain", annotations={"io.remora.accelerator": "false"}) as pod:
        script = "import remora; remora.connect().ping()"
        asked = pod.start("python3", "-c", script, image=IMAGE, env={"REMORA_TIMEOUT": "2"})
        assert asked.wait().exit_code == 1
        assert "UnavailableError" in asked.output()
