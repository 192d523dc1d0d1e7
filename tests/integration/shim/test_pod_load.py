"""Many pods at once, and pods under random kills: nobody else is hurt, and nothing is left.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from containerd_process import Containerd
from cri_client import CriError, Pod
from pod_leftovers import leftovers, record, wait_until

PODS = int(os.environ.get("REMORA_TEST_PODS", "3"))
FAULTS = int(os.environ.get("REMORA_TEST_FAULTS", "2"))
pytestmark = [pytest.mark.vm, pytest.mark.timeout(120 + 40 * PODS + 60 * FAULTS)]


def test_many_pods_at_once_all_work_and_leave_nothing(containerd: Containerd) -> None:
    def one(number: int) -> Pod:
        pod = containerd.cri.run_pod(f"many-{number}")
        box = pod.start("sleep", "1000000")
        assert box.sh(f"echo {number}; hostname") == f"{number}\nmany-{number}\n"
        return pod

    began_s = time.monotonic()
    with ThreadPoolExecutor(PODS) as pool:
        pods = list(pool.map(one, range(PODS)))
        up_s = time.monotonic() - began_s
        addresses = {pod.ip for pod in pods}
        shims = [_pss_kib(int(str(record(containerd, pod)["monitor_pid"]))) for pod in pods]
        machines = [_pss_kib(int(str(record(containerd, pod)["machine_pid"]))) for pod in pods]
        list(pool.map(Pod.remove, pods))
    assert len(addresses) == PODS
    print(
        f"{PODS} pods up after {up_s:.1f} s; PSS each: shim {sum(shims) // PODS} KiB, QEMU {sum(machines) // PODS} KiB"
    )
    for pod in pods:
        assert leftovers(containerd, pod) == []
    assert not list(containerd.runtime.glob("s/*"))
    assert not list(containerd.runtime.glob("shim/*"))


def test_kills_at_random_moments_leave_nothing_once_the_pod_is_removed(containerd: Containerd) -> None:
    chance = random.Random(4)
    for number in range(FAULTS):
        victim = ("shim", "machine", "containerd")[number % 3]
        delay_s = chance.uniform(0.0, 4.0)
        killed = threading.Thread(target=_kill, args=(containerd, f"fault-{number}", victim, delay_s))
        killed.start()
        pods: list[Pod] = []
        with contextlib.suppress(CriError):
            pods.append(containerd.cri.run_pod(f"fault-{number}"))
            box = pods[0].start("sh", "-c", "while :; do echo x; sleep 0.01; done")
            box.sh("sleep 1")
        killed.join()
        if victim == "containerd":
            containerd.kill()
            containerd.start()
        for sandbox in containerd.sandboxes(f"fault-{number}"):
            pod = Pod(containerd.cri, sandbox)
            pod.remove()
            _until_gone(containerd, pod, f"{victim} killed after {delay_s:.2f} s")
        wait_until(lambda: not list(containerd.runtime.glob("s/*")), f"no sandbox is left ({victim}, {delay_s:.2f} s)")
        wait_until(
            lambda: not list(containerd.runtime.glob("shim/*")), f"no socket is left ({victim}, {delay_s:.2f} s)"
        )


def _until_gone(containerd: Containerd, pod: Pod, when: str) -> None:
    try:
        wait_until(lambda: not leftovers(containerd, pod), "nothing of the pod is left")
    except AssertionError as error:
        raise AssertionError(f"{when}: {leftovers(containerd, pod)}") from error


def _kill(containerd: Containerd, name: str, victim: str, delay_s: float) -> None:
    """Kill part of the pod of that name so long after it was asked for."""
    time.sleep(delay_s)
    if victim == "containerd":
        containerd.kill(keep_client=True)
        return
    key = "monitor_pid" if victim == "shim" else "machine_pid"
    deadline_s = time.monotonic() + 10
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


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
