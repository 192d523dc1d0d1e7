"""Whatever is killed, nothing is left and the next run succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microvms import Remora, wait_until
from remora.sandboxes.leftovers import find_leftovers

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]


@pytest.fixture
def running(remora: Remora, template: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A foreground clone that answers, and its record."""
    with remora.start("run", "--no-accel", "--template", template) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        records = remora.records()
        assert len(records) == 1
        yield process, records[0]
        process.kill()


def keeper_of(record: dict[str, Any]) -> int:
    stat = Path(f"/proc/{record['monitor_pid']}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def nothing_is_left(remora: Remora) -> None:
    wait_until(lambda: not find_leftovers(remora.runtime), f"no leftovers: {find_leftovers(remora.runtime)}", 20)


def the_next_run_succeeds(remora: Remora, template: str) -> None:
    done = remora("run", "--no-accel", "--template", template, stdin=b"hello\n")
    assert done.returncode == 0, done.stderr.decode()
    assert b"got hello" in done.stdout


Running = tuple[subprocess.Popen[bytes], dict[str, Any]]


def test_killing_remora_run_ends_the_microvm(remora: Remora, template: str, running: Running) -> None:
    process, _ = running
    process.kill()
    nothing_is_left(remora)
    the_next_run_succeeds(remora, template)


def test_killing_qemu_is_reported_in_one_line(remora: Remora, template: str, running: Running) -> None:
    process, record = running
    os.kill(record["machine_pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0
    assert said.decode().splitlines() == ["remora run: QEMU was killed by signal 9 (Killed)"]
    nothing_is_left(remora)
    the_next_run_succeeds(remora, template)


def test_killing_the_monitor_is_reported_in_one_line(remora: Remora, template: str, running: Running) -> None:
    process, record = running
    os.kill(record["monitor_pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0
    assert said.decode().splitlines() == ["remora run: the monitor of the microVM was killed by signal 9"]
    nothing_is_left(remora)
    the_next_run_succeeds(remora, template)


def test_killing_the_keeper_changes_nothing_until_the_end(remora: Remora, running: Running) -> None:
    process, record = running
    os.kill(keeper_of(record), signal.SIGKILL)
    out, _ = process.communicate(b"still there\n", timeout=30)
    assert (process.returncode, out) == (0, b"got still there\n")
    nothing_is_left(remora)


def test_killing_everything_at_once_leaves_nothing_to_the_next_command(
    remora: Remora, template: str, running: Running
) -> None:
    process, record = running
    victims = (keeper_of(record), record["monitor_pid"], record["machine_pid"], process.pid)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    process.wait(30)
    assert remora("ps").returncode == 0
    nothing_is_left(remora)
    the_next_run_succeeds(remora, template)


def test_killing_a_boot_leaves_nothing(remora: Remora) -> None:
    with remora.start("run", "--no-accel", remora.image) as process:
        wait_until(lambda: any("machine_pid" in record for record in remora.records()), "QEMU has started")
        process.kill()
    nothing_is_left(remora)


def test_ctrl_c_during_a_boot_leaves_nothing(remora: Remora) -> None:
    with remora.start("run", "--no-accel", remora.image) as process:
        wait_until(lambda: any("machine_pid" in record for record in remora.records()), "QEMU has started")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    nothing_is_left(remora)
