"""`ctr run --runtime io.containerd.remora.v2`: one container in a microVM of its own, as any runtime would run it."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from containerd_process import BUSYBOX, Containerd
from pod_leftovers import wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
RUNTIME = ("--runtime", "io.containerd.remora.v2")


def test_output_errors_and_exit_status_come_through_and_all_layers_are_there(containerd: Containerd) -> None:
    done = containerd.run("out", "sh", "-c", "echo out; cat /data/layer; echo err >&2; exit 7")
    assert (done.stdout, done.returncode) == (b"out\nsecond\n", 7)
    assert b"err" in done.stderr


@pytest.mark.parametrize("size_mb", [8, pytest.param(100, marks=pytest.mark.slow)], ids=lambda size: f"{size}MB")
def test_stdin_comes_back_unchanged(containerd: Containerd, size_mb: int) -> None:
    data = os.urandom(size_mb * 1_000_000)
    done = containerd.run("stdin", "cat", stdin=data)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_a_command_that_does_not_exist_is_refused_by_name_and_leaves_nothing(containerd: Containerd) -> None:
    done = containerd.run("nosuch", "no-such-program")
    assert done.returncode != 0
    assert b"no-such-program" in done.stderr
    assert b"nosuch" not in containerd.ctr("containers", "ls").stdout, "ctr could remove it"
    wait_until(lambda: not containerd.of_pods(), "nothing is left of it")


def test_the_hosts_network_is_refused_by_name(containerd: Containerd) -> None:
    done = containerd.run("hostnet", "true", options=("--net-host",))
    assert done.returncode != 0
    assert b"hostNetwork" in done.stderr


def test_a_writable_mount_of_the_host_is_refused_by_name(containerd: Containerd) -> None:
    option = "type=bind,src=/etc,dst=/mnt,options=rbind:rw"
    done = containerd.run("rwmount", "true", options=("--mount", option))
    assert b"/mnt is writable" in done.stderr


@pytest.fixture
def sleeper(containerd: Containerd) -> str:
    name = f"s{time.monotonic_ns()}"
    done = containerd.ctr("run", "-d", *RUNTIME, BUSYBOX, name, "sh", "-c", "trap 'exit 5' TERM; sleep 1000 & wait")
    assert done.returncode == 0, done.stderr
    return name


def test_a_detached_container_is_executed_in_measured_paused_and_killed(containerd: Containerd, sleeper: str) -> None:
    def state() -> str:
        return containerd.ctr("tasks", "ls").stdout.decode().split(sleeper)[1].split()[1]

    done = containerd.ctr("tasks", "exec", "--exec-id", "e1", sleeper, "sh", "-c", "echo within; exit 3")
    assert (done.stdout, done.returncode) == (b"within\n", 3)
    assert b"memory.usage_in_bytes" in containerd.ctr("tasks", "metrics", sleeper).stdout
    assert len(containerd.ctr("tasks", "ps", sleeper).stdout.splitlines()) >= 2
    assert containerd.ctr("tasks", "pause", sleeper).returncode == 0
    assert state() == "PAUSED"
    assert containerd.ctr("tasks", "resume", sleeper).returncode == 0
    assert state() == "RUNNING"
    refused = containerd.ctr("tasks", "checkpoint", sleeper)
    assert b"cannot be checkpointed" in refused.stderr
    assert containerd.ctr("tasks", "kill", "-s", "SIGTERM", sleeper).returncode == 0
    deadline_s = time.monotonic() + 20
    while state() != "STOPPED":
        assert time.monotonic() < deadline_s
    assert b"non-zero exit code 5" in containerd.ctr("tasks", "rm", sleeper).stderr
    assert containerd.ctr("containers", "rm", sleeper).returncode == 0
    assert not list(containerd.runtime.glob("s/*"))
