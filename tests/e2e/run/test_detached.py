"""The life of a detached microVM: run -d, ps, logs, exec, stats, inspect, stop, rm."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from microvms import Remora, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

SCRIPT = "trap 'echo bye; exit 3' TERM; echo started; echo oops >&2; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def vm(remora: Remora) -> Iterator[str]:
    arguments = ("--name", "lamp", "--label", "room=kitchen", "-e", "SECRET=1", "-w", "/tmp")
    done = remora("run", "--no-accel", "-d", *arguments, remora.image, "sh", "-c", SCRIPT)
    assert done.returncode == 0, done.stderr.decode()
    sandbox = done.stdout.decode().strip()
    assert len(sandbox) == 12
    yield sandbox
    remora("rm", "-f", sandbox)


def test_ps_shows_it_by_label(remora: Remora, vm: str) -> None:
    listed = remora.json("ps", "--json", "--label", "room=kitchen")
    assert [(each["id"], each["name"], each["state"]) for each in listed] == [(vm, "lamp", "running")]
    assert remora.json("ps", "--json", "--label", "room=bath") == []
    assert remora("ps", "-q").stdout.decode().split() == [vm]
    table = remora("ps").stdout.decode()
    assert "lamp" in table
    assert "running" in table


def test_logs_have_both_streams(remora: Remora, vm: str) -> None:
    wait_until(lambda: remora("logs", vm).stdout, "the first output")
    done = remora("logs", "lamp")
    assert (done.stdout, done.stderr) == (b"started\n", b"oops\n")


def test_exec_has_streams_status_directory_and_environment(remora: Remora, vm: str) -> None:
    done = remora(
        *("exec", "-e", "X=1", "-u", "65534", vm, "sh", "-c", "cat; echo $X $SECRET; pwd; id -u; echo e >&2; exit 9"),
        stdin=b"in\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, b"in\n1 1\n/tmp\n65534\n", b"e\n")


def test_exec_of_nothing_that_exists(remora: Remora, vm: str) -> None:
    done = remora("exec", vm, "nosuch")
    assert done.returncode == 127
    assert done.stderr.count(b"\n") == 1


def test_stats_tell_memory_and_processes(remora: Remora, vm: str) -> None:
    (stats,) = remora.json("stats", "--json", vm)
    assert stats["processes"] >= 1
    assert stats["memory_bytes"] > 0
    assert stats["host_pss_bytes"] > 10 << 20
    assert "lamp" in remora("stats").stdout.decode()


def test_inspect_shows_no_secret_and_no_accelerator_device(remora: Remora, vm: str) -> None:
    (seen,) = remora.json("inspect", "--devices", vm)
    assert seen["image"].startswith(remora.image)
    assert "SECRET" not in str(seen)
    assert seen["device_nodes"]
    assert not [node for node in seen["device_nodes"] if "nvidia" in node or "dri" in node or "kfd" in node]
    assert any("virtio" in device for device in seen["devices"])


def test_a_running_one_is_not_removed_by_mistake(remora: Remora, vm: str) -> None:
    done = remora("rm", vm)
    assert done.returncode == 7
    assert f"remora rm -f {vm}" in done.stderr.decode()


def test_stop_lets_it_say_goodbye_and_keeps_its_output(remora: Remora, vm: str) -> None:
    with remora.start("logs", "-f", vm) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"started\n"
        assert remora("stop", vm).returncode == 0
        assert following.stdout.read() == b"bye\n"
        assert following.wait(30) == 0
    assert remora.json("ps", "--json") == []
    (listed,) = remora.json("ps", "-a", "--json")
    assert (listed["state"], listed["exit_status"]) == ("exited", 3)
    assert remora("exec", vm, "true").returncode == 7
    assert remora("logs", vm).stdout == b"started\nbye\n"
    assert remora("rm", vm).returncode == 0
    assert remora.json("ps", "-a", "--json") == []
    done = remora("logs", vm)
    assert done.returncode == 3
    assert b"`remora ps -a` lists them" in done.stderr


def test_a_stubborn_process_is_stopped_by_force(remora: Remora) -> None:
    script = "trap '' TERM; echo up; while :; do sleep 0.2; done"
    sandbox = remora("run", "--no-accel", "-d", remora.image, "sh", "-c", script).stdout.decode().strip()
    wait_until(lambda: remora("logs", sandbox).stdout, "its first line")
    assert remora("stop", "--time", "300ms", sandbox).returncode == 0
    (listed,) = remora.json("ps", "-a", "--json")
    assert (listed["state"], listed["exit_status"]) == ("exited", 128 + signal.SIGKILL)
    assert remora("rm", sandbox).returncode == 0


def test_a_detached_one_whose_monitor_is_killed_is_an_exited_one_with_the_reason(remora: Remora, template: str) -> None:
    sandbox = remora("run", "--no-accel", "-d", "--template", template).stdout.decode().strip()
    (record,) = remora.records()
    os.kill(record["monitor_pid"], signal.SIGKILL)
    wait_until(lambda: [r["state"] for r in remora.records()] == ["exited"], "the keeper has cleared up")
    (listed,) = remora.json("ps", "-a", "--json")
    assert "killed by signal 9" in listed["error"]
    assert {path.name for path in (remora.runtime / "s" / sandbox).iterdir()} <= {
        "lock",
        "state.json",
        "stdout.log",
        "stderr.log",
    }
    assert remora("rm", sandbox).returncode == 0
