"""Block volumes of a pod on real loop devices: written through, shared, read-only, private, let go of, or refused."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cri_v1 as cri
from containerd_process import Containerd
from cri_client import Container, CriError, Pod
from loop_devices import LoopDevice, loop_device, unavailable
from pod_leftovers import record, wait_until

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-"),
]
PATH = "/dev/xvda"
SIZE_BYTES = (16 << 20) + 512


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    with containerd.cri.run_pod("devices") as one:
        yield one


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDevice]:
    with loop_device(tmp_path / "disk", SIZE_BYTES) as one:
        yield one


def sleeper(pod: Pod, device: str, permissions: str = "mrw", path: str = PATH, **config: object) -> Container:
    device_ = cri.Device(container_path=path, host_path=device, permissions=permissions)
    return pod.start("sleep", "1000000", devices=[device_], **config)


def end(container: Container) -> None:
    container.stop(0)
    container.remove()


def detaches(disk: LoopDevice) -> bool:
    disk.detach()
    return not disk.attached


def test_what_a_container_has_synced_is_on_the_hosts_device_which_is_free_once_it_is_gone(
    pod: Pod, disk: LoopDevice
) -> None:
    box = sleeper(pod, disk.path)
    assert box.sh(f"blockdev --getsize64 {PATH}").strip() == str(SIZE_BYTES)
    box.sh(f"echo first | dd of={PATH} bs=512 conv=notrunc,fsync 2>/dev/null")
    assert disk.read(6) == b"first\n"
    # Not asked to be synced: its last close does so.
    box.sh(f"echo second | dd of={PATH} bs=512 seek=9 conv=notrunc 2>/dev/null")
    end(box)
    assert disk.read(7, 9 * 512) == b"second\n"
    assert detaches(disk), "nothing keeps the device open"


def test_two_containers_share_a_device_and_no_other_sees_it(pod: Pod, disk: LoopDevice) -> None:
    one, two = sleeper(pod, disk.path), sleeper(pod, disk.path, "r", "/data/block")
    other = pod.start("sleep", "1000000")
    one.sh(f"echo shared | dd of={PATH} conv=notrunc 2>/dev/null")
    assert two.sh("head -c 6 /data/block") == "shared"
    assert two.exec("sh", "-c", "echo x | dd of=/data/block conv=notrunc").exit_code != 0, "by its cgroup"
    numbers = one.sh(f"stat -c '%t %T' {PATH}").split()
    major, minor = (int(number, 16) for number in numbers)
    # Not even by a node that it makes itself.
    other.sh(f"mknod /tmp/mine b {major} {minor}")
    assert b"not permitted" in other.exec("head", "-c", "1", "/tmp/mine").stderr
    end(one)
    assert two.sh("head -c 6 /data/block") == "shared"
    for box in (two, other):
        end(box)
    assert detaches(disk)


def test_a_read_only_device_is_read_only_for_the_microvm_too(
    containerd: Containerd, pod: Pod, disk: LoopDevice
) -> None:
    disk.file.write_bytes(b"of the host" + bytes(SIZE_BYTES - 11))
    box = sleeper(pod, disk.path, "r")
    assert box.sh(f"head -c 11 {PATH}; blockdev --getsize64 {PATH}") == f"of the host{SIZE_BYTES}\n"
    assert box.exec("sh", "-c", f"echo x | dd of={PATH} conv=notrunc").exit_code != 0
    pid = record(containerd, pod)["machine_pid"]
    modes = [flags(pid, fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd) == disk.path]
    assert modes, "the microVM has it open"
    assert {mode & os.O_ACCMODE for mode in modes} == {os.O_RDONLY}
    with pytest.raises(CriError, match=r"/dev/xvda .*read-only, for another container"):
        sleeper(pod, disk.path)
    end(box)
    # The disk that held it takes layers again.
    assert pod.start("sleep", "1000000", image="localhost/remora/pause:1").sh("echo still works") == "still works\n"
    assert detaches(disk)


def flags(pid: object, fd: Path) -> int:
    return int(Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text().split("flags:")[1].split()[0], 8)


def test_owner_and_mode_are_the_hosts(pod: Pod, disk: LoopDevice) -> None:
    before = os.stat(disk.path)
    os.chown(disk.path, 1000, 2000)
    os.chmod(disk.path, 0o640)
    try:
        user = cri.ContainerSecurity(run_as_user=cri.Int64Value(value=1000))
        box = sleeper(pod, disk.path, security=user)
    finally:
        os.chown(disk.path, before.st_uid, before.st_gid)
        os.chmod(disk.path, before.st_mode & 0o7777)
    assert box.sh(f"stat -c '%u %g %a' {PATH}; head -c 1 {PATH} | wc -c") == "1000 2000 640\n1\n"
    end(box)


def test_what_cannot_be_given_is_refused_by_name_and_leaves_the_pod_as_it_was(
    containerd: Containerd, pod: Pod, tmp_path: Path
) -> None:
    (tmp_path / "mounted").mkdir()
    with loop_device(tmp_path / "fs") as fs, loop_device(tmp_path / "gone") as gone:
        subprocess.run(["mkfs.ext4", "-q", fs.path], check=True, timeout=60)
        subprocess.run(["mount", fs.path, str(tmp_path / "mounted")], check=True, timeout=30)
        try:
            for permissions in ("mrw", "r"):
                with pytest.raises(CriError, match=r"/dev/xvda .*the host has it mounted at"):
                    sleeper(pod, fs.path, permissions)
        finally:
            subprocess.run(["umount", str(tmp_path / "mounted")], check=True, timeout=30)
        with loop_device(Path(fs.path), 0) as above:
            subprocess.run(["mount", above.path, str(tmp_path / "mounted")], check=True, timeout=30)
            try:
                with pytest.raises(CriError, match=r"/dev/xvda .*the host has it mounted at"):
                    sleeper(pod, fs.path)
            finally:
                subprocess.run(["umount", str(tmp_path / "mounted")], check=True, timeout=30)
        claim = os.open(fs.path, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(CriError, match=r"/dev/xvda .*it is claimed"):
                sleeper(pod, fs.path)
        finally:
            os.close(claim)
        gone.detach()
        with pytest.raises(CriError, match=r"/dev/xvda .*(no medium|No such device)"):
            sleeper(pod, gone.path)
    with pytest.raises(CriError, match=r"/dev/fuse .*only block devices"):
        sleeper(pod, "/dev/loop-control", path="/dev/fuse")
    assert pod.start("echo", "fine").wait().exit_code == 0


def test_more_devices_than_disks_are_refused_and_another_pod_does_not_get_one_that_is_written(
    containerd: Containerd, pod: Pod, tmp_path: Path
) -> None:
    disks = [LoopDevice(tmp_path / f"d{number}", 1 << 20) for number in range(5)]
    try:
        boxes = [sleeper(pod, disk.path) for disk in disks[:4]]
        with pytest.raises(CriError, match=r"/dev/xvda .*no disk left for a writable device"):
            sleeper(pod, disks[4].path)
        with containerd.cri.run_pod("other") as other, pytest.raises(CriError, match=r"claimed: by another pod"):
            sleeper(other, disks[0].path)
        end(boxes.pop())
        boxes.append(sleeper(pod, disks[4].path))
        for box in boxes:
            end(box)
    finally:
        for disk in disks:
            disk.detach()
    assert not [disk for disk in disks if disk.attached]


@pytest.mark.parametrize("victim", ["machine_pid", "monitor_pid", "removal"])
def test_nothing_keeps_a_device_open_however_its_pod_ended(
    containerd: Containerd, disk: LoopDevice, victim: str
) -> None:
    with containerd.cri.run_pod("ends") as pod:
        box = sleeper(pod, disk.path)
        box.sh(f"echo kept | dd of={PATH} conv=notrunc,fsync 2>/dev/null")
        if victim != "removal":
            pid = record(containerd, pod)[victim]
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: detaches(disk), "the device is let go of", 10)
    assert detaches(disk)
    assert disk.file.read_bytes()[:5] == b"kept\n"


def test_a_container_outside_kubernetes_takes_a_device(containerd: Containerd, disk: LoopDevice) -> None:
    script = f"echo by ctr | dd of={disk.path} conv=notrunc,fsync 2>/dev/null; head -c 6 {disk.path}"
    done = containerd.run("device", "sh", "-c", script, options=("--device", disk.path))
    assert (done.stdout, done.returncode) == (b"by ctr", 0), done.stderr
    assert disk.read(7) == b"by ctr\n"
    assert detaches(disk)
