"""Pods and the node agent: a classification service behind a pod's address, under the pod's own identity."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator

import pytest

from containerd_process import Containerd
from cri_client import Pod
from pod_agent import IMAGE, Agent, classify, photos
from remora.agent import status
from remora.wire import control_v1

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


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


def state_grant(containerd: Containerd, *shares: str) -> str:
    """Do what the device plugin does at Allocate; return the id that the kubelet would pass on."""
    grant = control_v1.GrantRequest(id=secrets.token_hex(16), kind="cpu", shares=list(shares), shares_per_device=10)
    status.call(containerd.runtime / "control.sock", "Grant", grant, control_v1.Empty)
    return grant.id


def granted(containerd: Containerd, pod: Pod) -> list[str]:
    control = containerd.runtime / "control.sock"
    answer = status.call(control, "Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
    return [
        f"{one.kind} {one.shares}/{one.shares_per_device}"
        for each in answer.attachments
        if each.sandbox.endswith(pod.id[:8])
        for one in each.grants
    ]


def test_containers_bring_the_kubelets_grants_and_a_pods_author_none(containerd: Containerd, agent: Agent) -> None:
    first, second = state_grant(containerd, "cpu0-0", "cpu0-1"), state_grant(containerd, "cpu0-2")
    # The author knows an id, which cannot be, and writes it where authors can write.
    with containerd.cri.run_pod(
        "granted", annotations={"grant.remora.dev/cpu": state_grant(containerd, "cpu0-9")}
    ) as pod:
        pod.start("sleep", "1000")
        assert granted(containerd, pod) == []
        pod.start("sleep", "1000", annotations={"grant.remora.dev/cpu": first})
        assert granted(containerd, pod) == ["cpu 2/10"]
        pod.start("sleep", "1000", annotations={"grant.remora.dev/cpu": second})
        assert granted(containerd, pod) == ["cpu 3/10"]
        agent.stop(signal.SIGKILL)
        agent.start()
        assert granted(containerd, pod) == ["cpu 3/10"]
