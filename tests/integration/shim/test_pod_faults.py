"""Whatever dies, whoever asks next gets a clear answer, and in the end nothing of the pod is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import cri_v1 as cri
from containerd_process import Containerd
from cri_client import CriError
from pod_leftovers import leftovers, proportional_kib, record, wait_until
from remora import paths
from remora.shim import launcher

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def test_a_removed_pod_leaves_nothing_and_its_processes_were_in_its_cgroup(containerd: Containerd) -> None:
    parent = f"/remora-test-{os.getpid()}"
    pod = containerd.cri.run_pod("tidy", cgroup_parent=parent)
    fields = record(containerd, pod)
    pod.start("sleep", "1000000")
    for key in ("monitor_pid", "machine_pid"):
        assert f"{parent}/{pod.id}" in Path(f"/proc/{fields[key]}/cgroup").read_text()
    stats = pod.stats
    assert stats.memory is not None
    assert stats.memory.working_set_bytes is not None
    assert stats.memory.working_set_bytes.value > 50 << 20, "the microVM's memory is the pod's"
    netns = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    pod.remove()
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")
    wait_until(lambda: not list(containerd.runtime.glob("shim/*")), "no directory of a shim is left")
    after = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert len(after.splitlines()) < len(netns.splitlines())
    for folder in Path("/sys/fs/cgroup").glob(f"**{parent}"):
        folder.rmdir()


def test_a_killed_microvm_is_the_end_of_its_containers_and_of_the_pod(containerd: Containerd) -> None:
    pod = containerd.cri.run_pod("fallen")
    container = pod.start("sleep", "1000000")
    os.kill(int(str(record(containerd, pod)["machine_pid"])), signal.SIGKILL)
    assert container.wait().exit_code == 137
    wait_until(lambda: pod.status.state != cri.READY, "the pod is not ready any more")
    with pytest.raises(CriError):
        pod.start("true")
    pod.remove()
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")


def test_a_guest_that_has_fallen_silent_cannot_keep_its_pod_and_keeps_nobody_else_waiting(
    containerd: Containerd,
) -> None:
    settings = containerd.base / "runtime.toml"
    usual = settings.read_text()
    settings.write_text(usual.replace("[vm]", '[vm]\nkill_timeout = "5s"'))
    try:
        pod = containerd.cri.run_pod("silent")
    finally:
        settings.write_text(usual)
    container = pod.start("sleep", "1000000")
    assert container.stats.memory is not None
    machine = int(str(record(containerd, pod)["machine_pid"]))
    os.kill(machine, signal.SIGSTOP)
    began_s = time.monotonic()
    for _ in range(5):
        assert container.stats.memory is not None, "as it was when the guest last answered"
    assert time.monotonic() - began_s < 8
    pod.remove()
    assert time.monotonic() - began_s < 40
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")


def test_output_that_nobody_reads_fills_no_memory_and_holds_up_nothing_else(containerd: Containerd) -> None:
    with containerd.cri.run_pod("flood") as pod:
        container = pod.start("sleep", "1000000")
        shim = int(str(record(containerd, pod)["monitor_pid"]))
        assert container.sh("echo before") == "before\n"
        before_kib = proportional_kib(shim)
        floods = [container.exec_stream("cat", "/dev/zero", stdin=False) for _ in range(8)]
        time.sleep(2)
        assert container.sh("echo beside") == "beside\n"
        # A stream may have a quarter of a MiB under way.
        assert proportional_kib(shim) - before_kib < 6 << 10
        for flood in floods:
            flood.close()


def test_a_killed_shim_takes_its_microvm_along_and_is_cleared_up_after(containerd: Containerd) -> None:
    pod = containerd.cri.run_pod("headless")
    container = pod.start("sleep", "1000000")
    fields = record(containerd, pod)
    os.kill(int(str(fields["monitor_pid"])), signal.SIGKILL)
    assert container.wait().state == cri.EXITED
    wait_until(lambda: not Path(f"/proc/{fields['machine_pid']}/exe").exists(), "the microVM has ended")
    pod.remove()
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")
    wait_until(lambda: not list(containerd.runtime.glob("shim/*")), "no directory of a shim is left")


def test_a_shim_killed_before_it_could_note_what_its_directory_is_for_leaves_none(containerd: Containerd) -> None:
    program = containerd.base / "bin" / launcher.NAME
    usual = program.read_text()
    dies = "import os, remora.sandboxes.registry as r\nr.write_state = lambda record: os.kill(os.getpid(), 9)\n"
    program.write_text(usual.replace("sys.exit(", dies + "sys.exit("))
    try:
        with pytest.raises(CriError):
            containerd.cri.run_pod("unnoted")
    finally:
        program.write_text(usual)
    wait_until(lambda: not containerd.of_pods(), f"nothing is left: {containerd.of_pods()}")


def test_what_a_pod_writes_lies_on_a_disk_and_in_no_file_that_could_be_left(containerd: Containerd) -> None:
    with containerd.cri.run_pod("writer") as pod:
        pod.start("sleep", "1000000")
        opened = Path(f"/proc/{record(containerd, pod)['machine_pid']}/fd")
        links = [os.readlink(entry) for entry in opened.iterdir()]
        assert [link for link in links if link.startswith(f"{paths.state_dir()}/") and link.endswith(" (deleted)")]
        assert not list(containerd.runtime.rglob("scratch*"))
    assert not list(paths.state_dir().glob(".scratch-*"))


def test_pods_outlive_a_killed_containerd_and_are_known_to_the_next(containerd: Containerd) -> None:
    pod = containerd.cri.run_pod("survivor")
    container = pod.start("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done")
    ended = pod.start("sh", "-c", "sleep 2; exit 9")
    containerd.kill()
    time.sleep(3)  # the second container ends while nobody listens
    containerd.start()
    pod.cri = container.cri = ended.cri = containerd.cri
    assert ended.wait().exit_code == 9
    assert container.status.state == cri.RUNNING
    assert container.sh("echo alive") == "alive\n"
    seen = container.output()
    wait_until(lambda: container.output() != seen, "the log goes on")
    numbers = [int(line) for line in container.output().split()]
    assert numbers == sorted(numbers)
    container.stop(0)
    pod.remove()
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")


def test_a_pod_whose_shim_and_containerd_were_killed_together_is_cleared_up(containerd: Containerd) -> None:
    pod = containerd.cri.run_pod("both")
    pod.start("sleep", "1000000")
    fields = record(containerd, pod)
    containerd.kill()
    os.kill(int(str(fields["monitor_pid"])), signal.SIGKILL)
    containerd.start()
    pod.cri = containerd.cri
    pod.remove()
    wait_until(lambda: leftovers(containerd, pod) == [], f"nothing is left: {leftovers(containerd, pod)}")
