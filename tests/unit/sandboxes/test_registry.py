"""Who is alive, who is dead, and whose name is whose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from remora.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from remora.sandboxes import clearing
from remora.sandboxes.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def test_a_sandbox_lives_as_long_as_its_lock_is_held(registry: Registry) -> None:
    record, lock_fd = registry.create({"name": "lamp"})
    assert registry.is_alive(record)
    assert list(registry.dead()) == []
    os.close(lock_fd)
    assert not registry.is_alive(record)
    assert [directory for directory, _ in registry.dead()] == [record.directory]


def test_the_directory_is_for_its_owner_only(registry: Registry) -> None:
    record, lock_fd = registry.create({})
    os.close(lock_fd)
    assert record.directory.stat().st_mode & 0o777 == 0o700


def test_a_name_is_taken_until_its_sandbox_is_removed(registry: Registry) -> None:
    first, lock_fd = registry.create({"name": "lamp"})
    with pytest.raises(AlreadyExistsError, match="remora rm -f lamp"):
        registry.create({"name": "lamp"})
    os.close(lock_fd)
    registry.remove(first.directory)
    _, lock_fd = registry.create({"name": "lamp"})
    os.close(lock_fd)


@pytest.mark.parametrize("name", ["a/b", "-x", "x" * 64, "a b", ".hidden"])
def test_what_is_no_name(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        registry.create({"name": name})


def test_a_sandbox_is_found_by_name_id_or_beginning_of_the_id(registry: Registry) -> None:
    record, lock_fd = registry.create({"name": "lamp"})
    os.close(lock_fd)
    assert registry.find("lamp").id == registry.find(record.id).id == registry.find(record.id[:4]).id == record.id
    for wanted in ("lam", record.id[:2], "ffffffffffff0"):
        with pytest.raises(NotFoundError):
            registry.find(wanted)


def test_a_dead_foreground_sandbox_is_cleared_without_a_trace(registry: Registry, tmp_path: Path) -> None:
    record, lock_fd = registry.create({"name": "lamp"})
    (record.directory / "channel.sock").write_text("")
    os.close(lock_fd)
    assert clearing.sweep(registry) == 1
    assert list(tmp_path.iterdir()) == []
    assert clearing.sweep(registry) == 0


def test_a_dead_detached_sandbox_keeps_its_record_and_output(registry: Registry) -> None:
    record, lock_fd = registry.create({"detached": True, "state": "running"})
    for name in ("stdout.log", "channel.sock", "monitor.log"):
        (record.directory / name).write_text("")
    os.close(lock_fd)
    clearing.sweep(registry)
    assert {path.name for path in record.directory.iterdir()} == {"state.json", "lock", "stdout.log"}
    fields = json.loads((record.directory / "state.json").read_text())
    assert (fields["state"], fields["exit_status"]) == ("exited", 137)
    assert "killed" in fields["error"]
    # It has been dealt with.
    assert list(registry.dead()) == []


#: Where a maker is killed, as what it runs into: its lock, its record, that record's place.
MOMENTS = {
    "before its lock": (
        "usual = os.open; os.open = lambda path, *a: die() if str(path).endswith('/lock') else usual(path, *a)"
    ),
    "before its record": "r.write_state = lambda record: die()",
    "before its record is in place": "pathlib.Path.replace = lambda *_: die()",
}


def die_while_making(registry: Registry, moment: str) -> None:
    code = (
        "import os, sys, pathlib, remora.sandboxes.registry as r\n"
        "die = lambda: os.kill(os.getpid(), 9)\n"
        f"{MOMENTS[moment]}\n"
        "r.Registry(pathlib.Path(sys.argv[1])).create({'container': 'c1'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(registry.root.parent)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(registry.root.iterdir())) == 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_maker_that_was_killed_has_begun_is_removed_by_the_next_one(registry: Registry, moment: str) -> None:
    die_while_making(registry, moment)
    record, lock_fd = registry.create({"container": "c2"})
    assert [path.name for path in registry.root.iterdir()] == [record.id]
    os.close(lock_fd)


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_maker_that_was_killed_has_begun_is_removed_by_whoever_clears_up(
    registry: Registry, moment: str
) -> None:
    die_while_making(registry, moment)
    assert clearing.sweep(registry) == 0
    assert not registry.root.exists()
    registry.clear_unfinished()
    assert not registry.root.exists(), "where there is nothing, nothing is made"


def test_another_process_with_the_number_of_a_dead_qemu_is_left_alone(registry: Registry) -> None:
    _, lock_fd = registry.create({"machine_pid": os.getpid(), "machine_started": "1"})
    os.close(lock_fd)
    assert clearing.sweep(registry) == 1


def test_many_makers_at_once_share_names_fairly(registry: Registry) -> None:
    made: list[int] = []
    refused: list[Exception] = []

    def make(number: int) -> None:
        try:
            made.append(registry.create({"name": f"n{number % 4}"})[1])
        except AlreadyExistsError as error:
            refused.append(error)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (4, 12)
    for lock_fd in made:
        os.close(lock_fd)
