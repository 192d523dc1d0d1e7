"""CRI pods on the real containerd: what a kubelet does with a pod, and what its containers see of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import cri_v1 as cri
from containerd_process import Containerd
from cri_client import Container, CriError, Pod

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    with containerd.cri.run_pod("matrix") as one:
        yield one


@pytest.fixture(scope="module")
def box(pod: Pod) -> Container:
    """A container that waits, to be executed in."""
    return pod.start("sleep", "1000000", env={"COLOUR": "blue"})


def test_three_containers_share_one_microvm_its_name_and_its_network(pod: Pod, box: Container) -> None:
    server = pod.start("sh", "-c", "while :; do echo served | nc -l -p 7000; done")
    client = pod.start("sh", "-c", "until nc 127.0.0.1 7000; do sleep 0.1; done")
    assert client.wait().exit_code == 0
    assert client.output() == "served\n"
    assert box.sh("hostname") == server.sh("hostname") == "matrix\n"
    assert box.sh("cat /proc/sys/kernel/random/boot_id") == server.sh("cat /proc/sys/kernel/random/boot_id")
    assert "sleep 1000000" not in server.sh("ps"), "each has a PID namespace of its own"


def test_an_init_container_ends_before_the_next_begins_and_ipc_is_shared(pod: Pod, box: Container) -> None:
    init = pod.start("sh", "-c", "echo prepared > /dev/shm/ready; exit 0")
    assert init.wait().exit_code == 0
    assert box.sh("cat /dev/shm/ready") == "prepared\n"


def test_exec_has_both_streams_and_the_exit_status(box: Container) -> None:
    answer = box.exec("sh", "-c", "echo out; echo err >&2; exit 4")
    assert (bytes(answer.stdout), bytes(answer.stderr), answer.exit_code) == (b"out\n", b"err\n", 4)


def test_an_exec_past_its_time_is_ended(box: Container) -> None:
    with pytest.raises(CriError, match="timeout"):
        box.exec("sleep", "1000", timeout_s=1)
    assert "sleep 1000\n" not in box.sh("ps")


def test_logs_hold_both_streams_and_long_lines(pod: Pod) -> None:
    writer = pod.start("sh", "-c", "head -c 70000 /dev/zero | tr '\\0' x; echo; echo last >&2; printf unended")
    writer.wait()
    output = writer.output()
    assert output.count("x") == 70000
    assert "last\n" in output
    assert "unended" in output


def test_a_terminal_and_its_size(box: Container) -> None:
    with box.exec_stream("sh", tty=True) as terminal:
        terminal.resize(101, 33)
        # The first resize may come before the process: as kubectl does, it is sent again with each change.
        terminal.send(b"stty size; tty; exit 6\n")
        text, _, status = terminal.read_to_end()
    assert b"/dev/pts/" in text
    assert status["details"]["causes"][0]["message"] == "6"
    with box.exec_stream("sh", tty=True) as terminal:
        terminal.send(b"echo up\n")
        terminal.read_until(b"up\r\n")
        terminal.resize(101, 33)
        # containerd passes sizes on by itself; they may arrive a moment later.
        terminal.send(b"until stty size | grep '33 101'; do sleep 0.1; done; exit\n")
        assert b"33 101" in terminal.read_to_end()[0]


def test_attach_reaches_the_running_process_and_again_after_letting_go(pod: Pod) -> None:
    echo = pod.start("cat", stdin=True)
    for word in (b"first\n", b"second\n"):
        with echo.attach() as attached:
            attached.send(word)
            assert attached.read_until(word) == word
    assert echo.status.state == cri.RUNNING
    echo.stop(0)


def test_environment_user_and_working_directory(pod: Pod, box: Container) -> None:
    env = dict(line.split("=", 1) for line in box.sh("env").splitlines())
    assert env["COLOUR"] == "blue"
    assert env["REMORA_ADDRESS"] == env["VACCEL_RPC_ADDRESS"] == "unix:///run/remora/accel.sock"
    security = cri.ContainerSecurity(run_as_user=cri.Int64Value(value=1000), supplemental_groups=[44, 7])
    alice = pod.start("sh", "-c", "id; pwd", security=security, working_dir="/home/alice")
    alice.wait()
    text = alice.output()
    assert "uid=1000(alice)" in text
    assert "44(video)" in text
    assert text.endswith("/home/alice\n")


def test_capabilities_are_those_asked_for(pod: Pod, box: Container) -> None:
    def effective(text: str) -> int:
        return int(text.split("CapEff:")[1].split()[0], 16)

    net_admin, chown = 1 << 12, 1 << 0
    usual = effective(box.sh("cat /proc/1/status"))
    assert usual & chown
    assert not usual & net_admin
    capabilities = cri.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["CHOWN"])
    other = pod.start("cat", "/proc/self/status", security=cri.ContainerSecurity(capabilities=capabilities))
    other.wait()
    changed = effective(other.output())
    assert changed & net_admin
    assert not changed & chown


def test_seccomp_and_no_new_privileges(pod: Pod, box: Container) -> None:
    profile = cri.ContainerSecurity(seccomp=cri.SecurityProfile(profile_type=0), no_new_privs=True)
    confined = pod.start("cat", "/proc/self/status", security=profile)
    confined.wait()
    assert "Seccomp:\t2" in confined.output()
    assert "NoNewPrivs:\t1" in confined.output()


def test_a_read_only_root_cannot_be_written(pod: Pod) -> None:
    writer = pod.start("sh", "-c", "echo x > /data/x", security=cri.ContainerSecurity(readonly_rootfs=True))
    assert writer.wait().exit_code != 0
    assert "Read-only file system" in writer.output()


def test_limits_are_seen_enforced_and_changed(pod: Pod) -> None:
    limited = pod.start(
        "sleep", "100000", resources=cri.Resources(memory_limit_in_bytes=48 * MIB, cpu_quota=50000, cpu_period=100000)
    )
    assert limited.sh("cat /sys/fs/cgroup/memory.max") == f"{48 * MIB}\n"
    assert limited.sh("cat /sys/fs/cgroup/cpu.max") == "50000 100000\n"
    limited.update(cri.Resources(memory_limit_in_bytes=40 * MIB))
    assert limited.sh("cat /sys/fs/cgroup/memory.max") == f"{40 * MIB}\n"
    assert limited.sh("cat /sys/fs/cgroup/cpu.max") == "50000 100000\n"
    limited.update(cri.Resources(memory_limit_in_bytes=64 * MIB, cpu_quota=80000, cpu_period=100000))
    assert limited.sh("cat /sys/fs/cgroup/memory.max") == f"{64 * MIB}\n"
    assert limited.sh("cat /sys/fs/cgroup/cpu.max") == "80000 100000\n"
    limited.update(cri.Resources(cpu_quota=-1))
    assert limited.sh("cat /sys/fs/cgroup/cpu.max") == "max 100000\n"
    limited.stop(0)


def test_limits_beyond_the_microvm_are_refused_with_what_it_has_and_change_nothing(pod: Pod) -> None:
    limited = pod.start(
        "sleep", "100000", resources=cri.Resources(memory_limit_in_bytes=48 * MIB, cpu_quota=50000, cpu_period=100000)
    )
    with pytest.raises(CriError, match=r"memory limit of 4096 MiB .* 160 of its 256 MiB.*io\.remora\.memory"):
        limited.update(cri.Resources(memory_limit_in_bytes=4096 * MIB, cpu_quota=20000, cpu_period=100000))
    with pytest.raises(CriError, match=r"limit of 1\.5 CPUs .* microVM has: 1.*io\.remora\.cpus"):
        limited.update(cri.Resources(memory_limit_in_bytes=32 * MIB, cpu_quota=150000, cpu_period=100000))
    assert limited.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max") == f"{48 * MIB}\n50000 100000\n"
    limited.stop(0)


def test_running_out_of_memory_is_reported(pod: Pod) -> None:
    greedy = pod.start(
        "sh", "-c", "x=x; while :; do x=$x$x; done", resources=cri.Resources(memory_limit_in_bytes=24 * MIB)
    )
    status = greedy.wait()
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert pod.status.state == cri.READY


def test_stats_of_container_and_pod(containerd: Containerd, pod: Pod, box: Container) -> None:
    stats = box.stats
    assert stats.memory is not None
    assert stats.memory.working_set_bytes is not None
    assert stats.memory.working_set_bytes.value > 10_000
    assert stats.cpu is not None
    assert stats.cpu.usage_core_nano_seconds is not None
    assert stats.cpu.usage_core_nano_seconds.value > 0


def test_a_graceful_stop_gives_one_sigterm_and_its_time(pod: Pod) -> None:
    polite = pod.start("sh", "-c", "trap 'echo terminated; exit 3' TERM; echo up; while :; do sleep 0.1; done")
    _until_written(polite, "up\n")
    polite.stop(20)
    assert polite.status.exit_code == 3
    assert polite.output() == "up\nterminated\n"
    stubborn = pod.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
    _until_written(stubborn, "up\n")
    before_s = time.monotonic()
    stubborn.stop(2)
    assert stubborn.status.exit_code == 137
    assert time.monotonic() - before_s >= 2


def test_a_container_restarts_in_its_living_pod_also_after_the_last_one_ended(containerd: Containerd) -> None:
    with containerd.cri.run_pod("restarts") as pod:
        for _ in range(3):
            once = pod.start("sh", "-c", "cat /proc/sys/kernel/random/boot_id; test ! -e /x; touch /x")
            assert once.wait().exit_code == 0
            boots = once.output()
            once.remove()
            assert pod.status.state == cri.READY
            again = pod.start("cat", "/proc/sys/kernel/random/boot_id")
            again.wait()
            assert again.output() == boots


def test_a_pid_namespace_is_shared_by_request(pod: Pod) -> None:
    security = cri.ContainerSecurity(namespace_options=cri.NamespaceOption(pid=cri.POD))
    one = pod.start("sleep", "4242", security=security)
    two = pod.start("sleep", "5353", security=security)
    listing = two.sh("ps")
    assert "sleep 4242" in listing
    assert "sleep 5353" in listing
    one.stop(0)
    assert one.status.exit_code == 137 or one.status.exit_code == 143


def test_the_hosts_network_is_refused_by_name(containerd: Containerd) -> None:
    with pytest.raises(CriError, match="hostNetwork"):
        containerd.cri.run_pod("hostnet", network=cri.NODE)


def test_output_of_a_background_child_does_not_hold_the_end(pod: Pod) -> None:
    parent = pod.start("sh", "-c", "sleep 1000 & echo done")
    assert parent.wait(20).exit_code == 0
    assert parent.output() == "done\n"


def _until_written(container: Container, text: str) -> None:
    deadline_s = time.monotonic() + 20
    while text not in container.output():
        assert time.monotonic() < deadline_s, container.output()
        time.sleep(0.05)
