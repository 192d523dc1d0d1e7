"""What `--jail` says is read whole or refused with what to write, and no two microVMs share a user of a range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remora.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from remora.sandboxes import jailing
from remora.sandboxes.options import Options
from remora.sandboxes.templates import refuse_jail


def test_every_part_is_read(tmp_path: Path) -> None:
    parts = ("uid=30000-30001", "gid=7", f"base={tmp_path}", f"netns={tmp_path}", "cgroup=cpuset.cpus=0,1")
    read = jailing.parse((*parts, "cgroup=pids.max=64", "parent-cgroup=a/b"))
    assert read == (30000, 30001, 7, tmp_path, tmp_path, ("cpuset.cpus=0,1", "pids.max=64"), "a/b")


@pytest.mark.parametrize(
    ("parts", "fix"),
    [
        ((), "uid=30000-30999"),
        (("gid=5",), "uid=30000-30999"),
        (("uid=0",), "uid=30000"),
        (("uid=9-8",), "uid=30000"),
        (("uid=4294967295",), "uid=30000"),
        (("uid=root",), "uid=30000"),
        (("uid=5", "uid=6"), "once"),
        (("uid=5", "gid=0"), "gid=30000"),
        (("uid=5", "cgroup=pids.max"), "cgroup=FILE=VALUE"),
        (("uid=5", "cgroup=../x.y=1"), "cgroup=FILE=VALUE"),
        (("uid=5", "cgroup=a.b=1=2"), "cgroup=FILE=VALUE"),
        (("uid=5", "parent-cgroup=../up"), "parent-cgroup=vms"),
        (("uid=5", "parent-cgroup=/up"), "parent-cgroup=vms"),
        (("uid=5", "netns=/nowhere"), "ip netns add"),
        (("uid=5", "daemonize=1"), "parent-cgroup="),
        (("uid",), "parent-cgroup="),
    ],
)
def test_what_is_no_jail_is_refused_with_what_to_write(parts: tuple[str, ...], fix: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        jailing.parse(parts)
    assert fix in (refused.value.fix or "")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A firecracker on PATH that is a link, as releases are installed; returns what it leads to."""
    real = tmp_path / "firecracker-v1.16.1-x86_64"
    real.touch()
    real.chmod(0o755)
    (tmp_path / "firecracker").symlink_to(real)
    monkeypatch.setenv("PATH", str(tmp_path))
    return real


def record(uid: int, state: str = "running") -> dict[str, Any]:
    return {"state": state, "jail": {"uid": uid}}


def test_each_microvm_gets_a_user_of_its_own_until_none_is_left(program: Path) -> None:
    request = jailing.parse(("uid=30000-30001",))
    assert jailing.claim(request, [{"state": "running"}, record(30000)])["uid"] == 30001
    assert jailing.claim(request, [record(30000, "exited"), record(30001)])["uid"] == 30000
    with pytest.raises(ResourceExhaustedError):
        jailing.claim(request, [record(30000), record(30001)])


def test_one_named_user_may_have_several_microvms(program: Path) -> None:
    assert jailing.claim(jailing.parse(("uid=30000",)), [record(30000)])["uid"] == 30000


def test_a_jail_comes_back_from_its_record_by_the_programs_real_name(program: Path, tmp_path: Path) -> None:
    request = jailing.parse(("uid=30000", f"base={tmp_path}", "cgroup=pids.max=64"))
    made = jailing.jail_of({"id": "one", "jail": jailing.claim(request, [])})
    assert made is not None
    assert made.root == tmp_path / program.name / "one" / "root"
    assert (made.uid, made.gid, made.parent_cgroup, made.cgroups) == (30000, 30000, "remora", ("pids.max=64",))
    assert jailing.jail_of({"id": "one"}) is None


def test_templates_and_clones_are_refused_a_jail() -> None:
    with pytest.raises(FailedPreconditionError, match="neither a template nor a clone"):
        refuse_jail(Options(jail=jailing.parse(("uid=5",))))
    refuse_jail(Options())
