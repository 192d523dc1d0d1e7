"""Processes killed for want of memory: containerd is told at once, the container goes on, and ends with the reason."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

import cri_v1 as cri
from containerd_events import Events
from containerd_process import Containerd
from cri_client import Container, Pod
from pod_leftovers import record, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
MIB = 1 << 20
OOM = "/tasks/oom"
#: Takes more than LIMIT, in one piece.
GREEDY = "dd if=/dev/zero of=/dev/null bs=48M count=1"
LIMIT = cri.Resources(memory_limit_in_bytes=24 * MIB)
WAITS = "while :; do sleep 1; done"


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    with containerd.cri.run_pod("memory") as one:
        yield one


@pytest.fixture(scope="module")
def events(containerd: Containerd) -> Iterator[Events]:
    with Events(containerd) as one:
        yield one


def resident_mib(pid: int, mapping_mib: int) -> int:
    """Return how much of the host's memory a microVM's own takes: QEMU's mapping of that size."""
    size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, _, end = words[0].partition("-")
            size = (int(end, 16) - int(begin, 16)) // MIB
        elif words[0] == "Rss:" and size == mapping_mib:
            return int(words[1]) // 1024
    raise AssertionError(f"process {pid} maps no memory of {mapping_mib} MiB")


def until_reason(container: Container, reason: str) -> None:
    wait_until(lambda: container.status.reason == reason, f"{container.status.reason}")


def test_a_child_that_is_killed_is_told_while_its_container_goes_on(pod: Pod, events: Events) -> None:
    container = pod.start("sh", "-c", f"{GREEDY}; echo went on; {WAITS}", resources=LIMIT)
    events.wait_for(OOM, container.id)
    until_reason(container, "OOMKilled")
    assert container.status.state == cri.RUNNING
    assert container.sh("echo alive") == "alive\n"
    wait_until(lambda: "went on" in container.output(), container.output())
    time.sleep(1.5)  # a second event of the same kill would have come
    assert events.of(container.id).count(OOM) == 1
    container.stop(0)
    assert events.of(container.id).count(OOM) == 1


def test_an_executed_process_that_is_killed_is_told_and_ends_with_137(pod: Pod, events: Events) -> None:
    container = pod.start("sh", "-c", WAITS, resources=LIMIT)
    assert container.exec("sh", "-c", f"exec {GREEDY}").exit_code == 137
    events.wait_for(OOM, container.id)
    assert container.status.state == cri.RUNNING
    container.stop(0)


def test_many_kills_in_a_row_are_few_events(pod: Pod, events: Events) -> None:
    container = pod.start("sh", "-c", WAITS, resources=LIMIT)
    began_s = time.monotonic()
    container.sh(f"i=0; while [ $i -lt 12 ]; do {GREEDY} 2>/dev/null; i=$((i+1)); done; true")
    events.wait_for(OOM, container.id)
    took_s = time.monotonic() - began_s
    assert events.of(container.id).count(OOM) <= took_s + 2
    container.stop(0)


def test_the_first_process_that_is_killed_is_told_once_and_before_its_end(pod: Pod, events: Events) -> None:
    container = pod.start("sh", "-c", f"exec {GREEDY}", resources=LIMIT)
    status = container.wait()
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    events.wait_for("/tasks/exit", container.id)
    topics = events.of(container.id)
    assert topics.count(OOM) == 1
    assert topics.index(OOM) < topics.index("/tasks/exit")


def test_a_container_that_is_killed_by_request_did_not_run_out_of_memory(pod: Pod, events: Events) -> None:
    container = pod.start("sh", "-c", WAITS, resources=LIMIT)
    container.stop(0)
    assert (container.status.exit_code, container.status.reason) == (137, "Error")
    assert OOM not in events.of(container.id)


def test_a_container_without_a_limit_that_takes_all_of_the_microvm_is_told_and_its_neighbour_goes_on(
    containerd: Containerd, events: Events
) -> None:
    with containerd.cri.run_pod("boundless") as pod:
        neighbour = pod.start("sh", "-c", WAITS)
        seen = {line.split()[0]: int(line.split()[1]) for line in neighbour.sh("cat /proc/meminfo").splitlines()}
        # More than the guest has left, and not more than it has in all, which its kernel would refuse at once.
        greedy = f"dd if=/dev/zero of=/dev/null bs={(seen['MemTotal:'] + seen['MemAvailable:']) // 2}K count=1"
        child = pod.start("sh", "-c", f"{greedy}; echo went on; {WAITS}")
        events.wait_for(OOM, child.id)
        assert child.status.state == cri.RUNNING
        assert child.sh("echo alive") == "alive\n"
        first = pod.start("sh", "-c", f"exec {greedy}")
        status = first.wait()
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
        assert neighbour.sh("echo alive") == "alive\n"
        assert OOM not in events.of(neighbour.id)
        assert pod.status.state == cri.READY


def test_memory_that_a_container_has_freed_is_the_hosts_again(containerd: Containerd, pod: Pod) -> None:
    container = pod.start("sh", "-c", WAITS)
    fields = record(containerd, pod)

    def resident() -> int:
        return resident_mib(int(str(fields["machine_pid"])), int(str(fields["memory_mib"])))

    before = resident()
    # dd has read the whole of its block and waits for its reader, which ends first.
    user = Thread(target=container.sh, args=("dd if=/dev/zero bs=128M count=1 2>/dev/null | sleep 3; true",))
    user.start()
    wait_until(lambda: resident() > before + 100, f"{before} MiB, then {resident()}")
    user.join()
    wait_until(lambda: resident() < before + 20, f"{before} MiB, then {resident()}")
    container.stop(0)
