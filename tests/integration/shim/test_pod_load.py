"""Many pods that classify at once, and pods under random kills: nobody else is hurt, and nothing is left.

The counts are small here; REMORA_TEST_PODS=20 and REMORA_TEST_FAULTS=50 are the full ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from containerd_process import Containerd
from cri_client import CriError, Pod
from pod_agent import IMAGE, Agent, Caller, photos
from pod_leftovers import leftovers, netns_of, of_all_pods, proportional_kib, record, wait_until

PODS = int(os.environ.get("REMORA_TEST_PODS", "3"))
FAULTS = int(os.environ.get("REMORA_TEST_FAULTS", "4"))
#: On a busy machine everything takes longer, and nothing else changes.
PATIENCE_S = float(os.environ.get("REMORA_TEST_PATIENCE_S", "60"))
VICTIMS = ("agent", "shim", "machine", "containerd")
#: The last kills come while the pod has been answering for a while.
LATEST_S = 12.0
pytestmark = [pytest.mark.vm, pytest.mark.timeout(120 + 60 * PODS + 120 * FAULTS)]


def test_many_pods_at_once_all_classify_and_leave_nothing(containerd: Containerd, agent: Agent) -> None:
    pictures = [photo.read_bytes() for photo in photos()]

    def one(number: int) -> tuple[Pod, Caller]:
        pod = containerd.cri.run_pod(f"many-{number}", namespace="load")
        pod.start(image=IMAGE)
        return pod, Caller(pod.ip, pictures[number % len(pictures)], patience_s=PATIENCE_S + 10 * PODS)

    began_s = time.monotonic()
    with ThreadPoolExecutor(PODS) as pool:
        made = list(pool.map(one, range(PODS)))
        for _, caller in made:
            caller.wait_for(2)
        up_s = time.monotonic() - began_s
        pods = [pod for pod, _ in made]
        addresses = {pod.ip for pod in pods}
        namespaces = [netns_of(containerd, pod.id) for pod in pods]
        shims = [proportional_kib(int(str(record(containerd, pod)["monitor_pid"]))) for pod in pods]
        machines = [proportional_kib(int(str(record(containerd, pod)["machine_pid"]))) for pod in pods]
        # Half of them are removed while the others still classify.
        for _, caller in made[::2]:
            caller.stop()
        removed_s = time.monotonic()
        list(pool.map(Pod.remove, pods[::2]))
        for _, caller in made[1::2]:
            caller.wait_for(caller.answers + 1)
            caller.stop()
        list(pool.map(Pod.remove, pods[1::2]))
        removed_s = time.monotonic() - removed_s
    answers = sum(caller.answers for _, caller in made)
    print(
        f"{PODS} pods classify after {up_s:.1f} s, removed in {removed_s:.1f} s; {answers} answers; "
        f"PSS each: shim {sum(shims) // PODS} KiB, QEMU {sum(machines) // PODS} KiB"
    )
    assert len(addresses) == PODS
    assert [(caller.wrong, caller.failures) for _, caller in made] == [(0, [])] * PODS
    for pod in pods:
        assert leftovers(containerd, pod) == []
    assert not [path for path in namespaces if path.exists()]
    _until_nothing(containerd, "at the end")


def test_kills_at_random_moments_leave_nothing_once_the_pod_is_removed(containerd: Containerd, agent: Agent) -> None:
    chance = random.Random(4)
    picture = photos()[0].read_bytes()
    for number in range(PODS):
        # There are some if the test before failed.
        for sandbox in containerd.sandboxes(f"many-{number}"):
            Pod(containerd.cri, sandbox).remove()
    counts: Counter[str] = Counter()
    began_s = time.monotonic()
    bystander = containerd.cri.run_pod("bystander", namespace="load")
    bystander.start(image=IMAGE)
    asked = Caller(bystander.ip, picture, patience_s=PATIENCE_S)
    asked.wait_for(1)
    for number in range(FAULTS):
        victim = VICTIMS[number % len(VICTIMS)]
        failures = len(asked.failures)
        delay_s = chance.uniform(0.0, LATEST_S)
        what = f"{victim} killed after {delay_s:.2f} s"
        name = f"fault-{number}"
        killed = threading.Thread(target=_kill, args=(containerd, agent, name, victim, delay_s))
        killed.start()
        caller = None
        with contextlib.suppress(CriError):
            pod = containerd.cri.run_pod(name, namespace="load")
            pod.start(image=IMAGE)
            caller = Caller(pod.ip, picture, patience_s=PATIENCE_S)
        killed.join()
        counts[victim] += 1
        if victim == "containerd":
            containerd.kill()
            containerd.start()
        if victim == "agent":
            agent.stop()
            agent.start()
            if caller is not None:
                # Whenever the agent went, the pod has an accelerator again.
                caller.wait_for(caller.answers + 1)
        if caller is not None:
            caller.stop()
            counts["answers"] += caller.answers
            assert caller.wrong == 0, what
        for sandbox in containerd.sandboxes(name):
            pod = Pod(containerd.cri, sandbox)
            netns = netns_of(containerd, sandbox)
            pod.remove()
            _until_gone(containerd, pod, what)
            assert not netns.is_mount(), what
        bystander.cri = containerd.cri
        _until_nothing(containerd, what, [bystander.id])
        failed = len(asked.failures)
        asked.wait_for(asked.answers + 1)
        assert asked.wrong == 0, what
        if victim != "agent":
            assert failed == failures, f"{what}: requests to another pod failed: {asked.failures[failures:]}"
        print(f"{number + 1}/{FAULTS} {time.monotonic() - began_s:.0f} s: {what}", flush=True)
    asked.stop()
    counts["answers of the bystander"] = asked.answers
    bystander.remove()
    _until_nothing(containerd, "at the end")
    print(f"{dict(counts)} in {time.monotonic() - began_s:.0f} s")


def _until_gone(containerd: Containerd, pod: Pod, when: str) -> None:
    try:
        wait_until(lambda: not leftovers(containerd, pod), "nothing of the pod is left")
    except AssertionError as error:
        raise AssertionError(f"{when}: {leftovers(containerd, pod)}") from error


def _until_nothing(containerd: Containerd, when: str, kept: Sequence[str] = ()) -> None:
    try:
        wait_until(lambda: not of_all_pods(containerd, kept), "nothing of any other pod is left")
    except AssertionError as error:
        raise AssertionError(f"{when}: {of_all_pods(containerd, kept)}") from error


def _kill(containerd: Containerd, agent: Agent, name: str, victim: str, delay_s: float) -> None:
    """Kill part of the pod of that name, or what it depends on, so long after it was asked for."""
    time.sleep(delay_s)
    if victim == "containerd":
        containerd.kill(keep_client=True)
        return
    if victim == "agent":
        agent.stop(signal.SIGKILL)
        return
    key = "monitor_pid" if victim == "shim" else "machine_pid"
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        for state in containerd.runtime.glob("s/*/state.json"):
            with contextlib.suppress(OSError, ValueError):
                text = state.read_text()
                if f".{name}." in text:
                    pid = json.loads(text).get(key)
                    if pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                        return
        time.sleep(0.02)
