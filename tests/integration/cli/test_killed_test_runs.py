"""A test run that is killed leaves things; the next one removes them, and nothing of a run that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import run_leftovers
from microvms import wait_until

SUPPORT = Path(run_leftovers.__file__).parent
RUN = """
import os, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
import run_leftovers
run_leftovers.mark_children()
link = f"rmx{os.getpid() % 100000}"
made = run_leftovers.directory("remora-left-", link)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL)
group = pathlib.Path(f"/sys/fs/cgroup/{sys.argv[2]}/remora-test-{os.getpid()}-0")
if os.geteuid() == 0:
    subprocess.run(["ip", "link", "add", link, "type", "bridge"], check=True)
    (group / "below").mkdir(parents=True)
    (made / "mount").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(made / "mount")], check=True)
print(made, child.pid, link, group, flush=True)
sys.stdin.read()
"""


@dataclass
class Run:
    process: subprocess.Popen[str]
    made: Path
    child: int
    link: str
    group: Path

    def left(self) -> dict[str, bool]:
        found = {"directory": self.made.exists(), "process": Path(f"/proc/{self.child}/exe").exists()}
        if os.geteuid() == 0:
            found |= {"link": Path(f"/sys/class/net/{self.link}").exists(), "cgroup": self.group.exists()}
        return found


@pytest.fixture
def start_run() -> Iterator[Callable[[], Run]]:
    runs = []
    hierarchy = "" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "pids"

    def start() -> Run:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(SUPPORT), hierarchy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        made, child, link, group = process.stdout.readline().split()
        runs.append(Run(process, Path(made), int(child), link, Path(group)))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()
    run_leftovers.sweep()


def test_the_next_run_removes_what_a_killed_one_has_left_and_nothing_of_one_that_lives(
    start_run: Callable[[], Run],
) -> None:
    killed, living = start_run(), start_run()
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(20)
    assert all(killed.left().values()), killed.left()
    swept = run_leftovers.sweep()
    assert {f"directory {killed.made}", f"process {killed.child}"} <= set(swept)
    wait_until(lambda: not any(killed.left().values()), f"nothing is left: {killed.left()}", 20)
    assert all(living.left().values()), living.left()


def test_a_number_that_another_process_has_now_is_not_the_run(tmp_path: Path) -> None:
    pid, _, start = run_leftovers._run_of(os.getpid()).partition("-")
    assert not run_leftovers._is_over(f"{pid}-{start}")
    assert run_leftovers._is_over(f"{pid}-{int(start) - 1}")
    assert not run_leftovers._is_over("somebody")
