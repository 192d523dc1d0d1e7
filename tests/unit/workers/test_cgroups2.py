"""Control groups of version 2, on a tree that plays the kernel's part (this machine may have version 1 only)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path, PosixPath

import pytest

from fake_cgroup2 import FakeCgroup2Path, fake_cgroup2, processes, put_processes
from remora.workers import cgroups
from remora.workers.cgroups import Bounds, Groups, detect

BOUNDS = Bounds(memory_bytes=1 << 30, processes=64, cpus=1.5)
Detect = Callable[..., Groups | str]


@pytest.fixture
def tree(tmp_path: Path) -> FakeCgroup2Path:
    return fake_cgroup2(tmp_path / "cgroup")


@pytest.fixture
def service(tree: FakeCgroup2Path) -> FakeCgroup2Path:
    """The group that a service manager has given the agent: it alone is in there."""
    (tree / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    group = tree / "remora.service"
    group.mkdir()
    put_processes(group, os.getpid())
    return group


@pytest.fixture
def found(tree: FakeCgroup2Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Groups | str]:
    """`detect` for a process in a group of the tree."""
    read = cgroups._text
    proc = {"/proc/self/mountinfo": f"30 23 0:26 / {tree} rw,nosuid - cgroup2 cgroup2 rw\n"}
    monkeypatch.setattr(cgroups, "Path", FakeCgroup2Path)
    monkeypatch.setattr(cgroups, "_text", lambda path: proc.get(str(path)) or read(path))

    def detected(own: str = "/remora.service") -> Groups | str:
        proc["/proc/self/cgroup"] = f"0::{own}\n"
        return detect()

    return detected


def value(group: Path, file: str) -> str:
    return (group / file).read_text().strip()


def own_group(service: Path) -> Path:
    return next(path for path in service.iterdir() if cgroups._NAME.fullmatch(path.name))


def test_the_agent_moves_into_a_leaf_so_that_its_workers_can_have_bounds(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    groups = found()
    assert isinstance(groups, Groups)
    assert groups.version == 2
    assert set(groups.controllers) == {"memory", "pids", "cpu"}
    assert processes(service) == []
    leaf = next(path for path in service.iterdir() if cgroups._LEAF.fullmatch(path.name))
    assert processes(leaf) == [os.getpid()]
    assert set(value(service, "cgroup.subtree_control").split()) == {"memory", "pids", "cpu"}


def test_a_second_start_in_a_delegated_group_finds_everything_ready(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    for _ in range(2):
        groups = found()
        assert isinstance(groups, Groups)
        groups.close()
    assert [path for path in service.iterdir() if cgroups._NAME.fullmatch(path.name)] == []


def test_a_group_with_other_processes_is_left_alone_and_the_reason_is_told(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    put_processes(service, os.getpid(), 1)
    reason = found()
    assert isinstance(reason, str)
    assert "busy" in reason
    assert [path for path in service.iterdir() if path.is_dir()] == []
    assert processes(service) == [os.getpid(), 1]


def test_bounds_are_written_as_version_2_wants_them(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    groups = found()
    assert isinstance(groups, Groups)
    group = groups.create("w7")
    directory = own_group(service) / "w7"
    assert group.join_files == [str(directory / "cgroup.procs")]
    group.bound(BOUNDS)
    assert value(directory, "memory.max") == str(1 << 30)
    assert value(directory, "memory.swap.max") == "0"
    assert value(directory, "memory.oom.group") == "1"
    assert value(directory, "pids.max") == "64"
    assert value(directory, "cpu.max") == "150000 100000"
    group.bound(Bounds())
    assert value(directory, "memory.max") == value(directory, "pids.max") == "max"
    assert value(directory, "cpu.max") == "max 100000"


def test_without_a_controller_the_others_bound_all_the_same(
    tree: FakeCgroup2Path, found: Callable[[str], Groups | str]
) -> None:
    (tree / "cgroup.subtree_control").write_text("+memory +pids")
    (tree / "some.slice").mkdir()
    groups = found("/some.slice")
    assert isinstance(groups, Groups)
    groups.create("w1").bound(BOUNDS)
    directory = own_group(tree / "some.slice") / "w1"
    assert value(directory, "memory.max") == str(1 << 30)
    assert not (directory / "cpu.max").exists()


def test_a_group_without_the_memory_controller_is_of_no_use(
    tree: FakeCgroup2Path, found: Callable[[str], Groups | str]
) -> None:
    (tree / "cgroup.subtree_control").write_text("+pids")
    (tree / "some.slice").mkdir()
    assert found("/some.slice") == "no control groups are mounted"


def test_an_end_by_the_memory_bound_is_told_from_others(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    groups = found()
    assert isinstance(groups, Groups)
    group = groups.create("w1")
    assert not group.out_of_memory()
    events = own_group(service) / "w1" / "memory.events"
    PosixPath(events).write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 1\n")
    assert group.out_of_memory()


def test_processes_that_are_left_in_a_group_are_killed_before_it_goes(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    groups = found()
    assert isinstance(groups, Groups)
    group = groups.create("w1")
    directory = own_group(service) / "w1"
    with subprocess.Popen(["sleep", "60"]) as left:
        put_processes(directory, left.pid)
        assert not group.remove()
        assert left.wait(10) < 0
    put_processes(directory)  # the kernel's part
    assert group.remove()
    assert not directory.exists()


def test_the_groups_of_dead_agents_are_swept_and_those_of_living_ones_stay(
    service: FakeCgroup2Path, found: Callable[[], Groups | str]
) -> None:
    assert isinstance(found(), Groups)  # the first start delegates
    pid = os.getpid()
    for name in ("remora-4194303-17-0", f"remora-{pid}-{cgroups.start_time(pid)}-99", "somebody-elses"):
        (service / name).mkdir()
    (service / "remora-4194303-17-0" / "w3").mkdir()
    assert isinstance(found(), Groups)
    names = {path.name for path in service.iterdir() if path.is_dir()}
    assert "remora-4194303-17-0" not in names
    assert {f"remora-{pid}-{cgroups.start_time(pid)}-99", "somebody-elses"} <= names
