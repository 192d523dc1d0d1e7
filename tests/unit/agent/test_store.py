"""The store: uploads in chunks, who owns what, quotas, eviction, damage and recovery."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from agent_rooms import Box, Rooms, rooms
from remora.agent.policy import Limits, StoreLimits
from remora.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
)

DATA = bytes(range(256)) * 100


def ignore(_outcome: object) -> None:
    """Nobody waits."""


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(room: Rooms, tenant: str, data: bytes, *, chunk: int = 10_000, digest: str = "") -> Any:
    """Upload in chunks; return the last outcome."""
    name = digest or digest_of(data)
    outcome: Any = None
    for offset in range(0, len(data), chunk):
        box: Box[Any] = Box()
        room.store.put(tenant, name, offset, len(data), data[offset : offset + chunk], box)
        outcome = room.wait(box)
        if isinstance(outcome, RemoraError):
            return outcome
    return outcome


def open_path(room: Rooms, tenant: str, digest: str) -> Any:
    box: Box[Any] = Box()
    room.store.open(tenant, digest, box)
    return room.wait(box)


def test_an_upload_in_chunks_is_complete_with_the_last_one(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        assert put(room, "a", DATA) == (len(DATA), True)
        assert room.store.stat("a", digest_of(DATA)) == (True, len(DATA))
        assert open_path(room, "a", digest_of(DATA)).read_bytes() == DATA
        assert room.store.bytes_stored == len(DATA)
        assert not list((tmp_path / "s/partial").glob("*/*"))


def test_chunks_may_be_in_flight_together(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        boxes = []
        for offset in range(0, len(DATA), 5000):
            box: Box[Any] = Box()
            room.store.put("a", digest_of(DATA), offset, len(DATA), DATA[offset : offset + 5000], box)
            boxes.append(box)
        answers = [room.wait(box) for box in boxes]
        assert [done for _bytes, done in answers] == [False] * (len(boxes) - 1) + [True]


def test_an_upload_resumes_after_a_restart(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        room.store.put("a", digest_of(DATA), 0, len(DATA), DATA[:9000], box)
        assert room.wait(box) == (9000, False)
    with rooms(tmp_path / "s") as room:
        assert room.store.stat("a", digest_of(DATA)) == (False, 9000)
        box = Box()
        room.store.put("a", digest_of(DATA), 9000, len(DATA), DATA[9000:], box)
        assert room.wait(box) == (len(DATA), True)


def test_an_acknowledged_upload_is_there_after_a_restart(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
    with rooms(tmp_path / "s") as room:
        assert room.store.stat("a", digest_of(DATA)) == (True, len(DATA))
        assert room.store.bytes_stored == len(DATA)


def test_a_chunk_sent_again_is_skipped_and_one_with_a_gap_is_refused(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        room.store.put("a", digest_of(DATA), 0, len(DATA), DATA[:5000], box)
        room.store.put("a", digest_of(DATA), 0, len(DATA), DATA[:5000], box)
        room.store.put("a", digest_of(DATA), 4000, len(DATA), DATA[4000:8000], box)
        answers = [room.wait(box) for _ in range(3)]
        assert all(received >= 5000 and not complete for received, complete in answers)
        assert room.store.stat("a", digest_of(DATA)) == (False, 8000)
        with pytest.raises(FailedPreconditionError, match="8000 bytes were received"):
            room.store.put("a", digest_of(DATA), 9000, len(DATA), DATA[9000:], box)
        with pytest.raises(InvalidArgumentError, match="announced"):
            room.store.put("a", digest_of(DATA), 8000, 99, DATA[8000:], box)
        room.store.put("a", digest_of(DATA), 8000, len(DATA), DATA[8000:], box)
        assert room.wait(box) == (len(DATA), True)


def test_bytes_that_do_not_match_their_digest_are_refused_and_removed(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        assert isinstance(put(room, "a", DATA, digest=digest_of(b"other")), DataLossError)
        assert room.store.stat("a", digest_of(b"other")) == (False, 0)
        assert room.store.bytes_stored == 0
        assert put(room, "a", DATA) == (len(DATA), True)


def test_a_tenant_cannot_tell_anothers_resource_from_none(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        assert room.store.stat("b", digest_of(DATA)) == room.store.stat("b", digest_of(b"nobody has this"))
        assert isinstance(open_path(room, "b", digest_of(DATA)), NotFoundError)


def test_a_second_tenant_uploads_every_byte_and_shares_the_file(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        box: Box[Any] = Box()
        room.store.put("b", digest_of(DATA), 0, len(DATA), DATA[:100], box)
        assert room.wait(box) == (100, False)
        room.store.put("b", digest_of(DATA), 100, len(DATA), DATA[100:], box)
        assert room.wait(box) == (len(DATA), True)
        assert len(list((tmp_path / "s/resources").glob("*/*"))) == 1
        assert room.store.bytes_stored == len(DATA)
        room.store.release("a", digest_of(DATA))
        assert open_path(room, "b", digest_of(DATA)).exists()
        room.store.release("b", digest_of(DATA))
        room.run_until(lambda: not room.files.complete())


def test_a_tenants_quota_is_named_when_it_refuses(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", store_limits=StoreLimits(tenant_bytes=30_000)) as room:
        put(room, "a", DATA)
        with pytest.raises(ResourceExhaustedError, match=r"store\.tenant_bytes"):
            room.store.put("a", digest_of(b"x"), 0, 10_000, b"x", ignore)
        put(room, "b", b"y" * 10_000)


def test_the_number_of_resources_is_limited(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", limits=Limits(resources_per_tenant=1)) as room:
        put(room, "a", DATA)
        with pytest.raises(ResourceExhaustedError, match=r"limits\.resources_per_tenant"):
            room.store.put("a", digest_of(b"x"), 0, 1, b"x", ignore)


def test_space_is_made_by_evicting_the_oldest_that_no_session_holds(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", store_limits=StoreLimits(total_bytes=30_000)) as room:
        for letter in (b"1", b"2", b"3"):
            put(room, "a", letter * 10_000)
            room.wall_s += 10
        room.store.hold("a", digest_of(b"1" * 10_000))
        put(room, "b", b"4" * 10_000)
        assert room.store.owns("a", digest_of(b"1" * 10_000))
        assert not room.store.owns("a", digest_of(b"2" * 10_000))
        assert room.store.owns("a", digest_of(b"3" * 10_000))
        room.store.hold("a", digest_of(b"3" * 10_000))
        room.store.hold("b", digest_of(b"4" * 10_000))
        with pytest.raises(ResourceExhaustedError, match=r"store\.total_bytes"):
            room.store.put("b", digest_of(b"5" * 10_000), 0, 10_000, b"5" * 10_000, ignore)


def test_what_nobody_used_for_long_is_removed(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", store_limits=StoreLimits(max_age_s=100)) as room:
        put(room, "a", DATA)
        put(room, "a", b"held")
        room.store.hold("a", digest_of(b"held"))
        room.wall_s += 101
        room.store.sweep()
        assert not room.store.owns("a", digest_of(DATA))
        assert room.store.owns("a", digest_of(b"held"))


def test_a_damaged_file_is_found_before_it_is_used_and_can_be_uploaded_again(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        path = open_path(room, "a", digest_of(DATA))
        path.write_bytes(b"!" + DATA[1:])
        assert isinstance(open_path(room, "a", digest_of(DATA)), DataLossError)
        assert room.store.stat("a", digest_of(DATA)) == (False, 0)
        assert put(room, "a", DATA) == (len(DATA), True)
        assert open_path(room, "a", digest_of(DATA)).read_bytes() == DATA


def test_a_full_disk_is_an_answer_and_leaves_what_was_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        room.store.put("a", digest_of(DATA), 0, len(DATA), DATA[:9000], box)
        room.wait(box)

        def full(fd: int, data: object, offset: int) -> int:
            os.ftruncate(fd, offset + 10)  # some of it arrived
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            room.store.put("a", digest_of(DATA), 9000, len(DATA), DATA[9000:], box)
            outcome = room.wait(box)
        assert isinstance(outcome, ResourceExhaustedError)
        assert outcome.fix
        assert room.store.stat("a", digest_of(DATA)) == (False, 9000)
        room.store.put("a", digest_of(DATA), 9000, len(DATA), DATA[9000:], box)
        assert room.wait(box) == (len(DATA), True)


def test_a_file_that_was_never_acknowledged_does_not_survive_a_restart(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        path = room.files.path(digest_of(DATA))
        path.write_bytes(DATA)
    with rooms(tmp_path / "s") as room:
        assert not path.exists()
        assert room.store.stat("a", digest_of(DATA)) == (False, 0)


def test_a_tenant_that_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        box: Box[Any] = Box()
        room.store.put("a", digest_of(b"half"), 0, 4, b"ha", box)
        room.wait(box)
        room.store.drop_tenant("a")
        room.run_until(lambda: not room.files.partials() and not room.files.complete())
        assert room.store.bytes_stored == 0


def test_add_stores_a_whole_resource(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        room.store.add("a", DATA, box)
        assert room.wait(box) == digest_of(DATA)
        room.store.add("a", DATA, box)
        assert room.wait(box) == digest_of(DATA)
        assert room.store.owns("a", digest_of(DATA))


def test_a_dropped_tenant_takes_nothing_of_another_along(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        put(room, "b", DATA)
        box: Box[Any] = Box()
        room.store.put("b", digest_of(b"half"), 0, 4, b"ha", box)
        room.wait(box)
        room.store.drop_tenant("a")
        assert open_path(room, "b", digest_of(DATA)).read_bytes() == DATA
        room.store.put("b", digest_of(b"half"), 2, 4, b"lf", box)
        assert room.wait(box) == (4, True)


def test_a_resource_given_up_while_another_tenant_finishes_its_upload_stays_for_that_one(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        box: Box[Any] = Box()
        room.store.put("b", digest_of(DATA), 0, len(DATA), DATA, box)
        room.store.release("a", digest_of(DATA))
        assert room.wait(box) == (len(DATA), True)
        assert open_path(room, "b", digest_of(DATA)).read_bytes() == DATA


def test_connections_that_upload_the_same_at_the_same_time_all_see_it_complete(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        boxes: list[Box[Any]] = [Box() for _ in range(4)]
        for box in boxes:
            room.store.put("a", digest_of(DATA), 0, len(DATA), DATA, box)
        stated: Box[Any] = Box()
        room.store.stat_settled("a", digest_of(DATA), stated)
        assert [room.wait(box) for box in boxes] == [(len(DATA), True)] * 4
        assert room.wait(stated) == (True, len(DATA))


def test_a_chunk_after_one_that_failed_is_told_so_and_the_quota_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rooms(tmp_path / "s") as room:

        def full(fd: int, data: object, offset: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            boxes: list[Box[Any]] = [Box() for _ in range(3)]
            for number, box in enumerate(boxes):
                room.store.put("a", digest_of(DATA), number * 100, len(DATA), DATA[number * 100 :][:100], box)
            outcomes = [room.wait(box) for box in boxes]
        assert [type(outcome) for outcome in outcomes] == [
            ResourceExhaustedError,
            FailedPreconditionError,
            FailedPreconditionError,
        ]
        assert put(room, "a", DATA) == (len(DATA), True)
        room.store.release("a", digest_of(DATA))
        assert not room.store._ledger.tenant_bytes
        assert room.store.bytes_stored == 0


def test_an_upload_that_does_not_go_on_is_removed_and_gives_its_quota_back(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", store_limits=StoreLimits(tenant_bytes=1000, partial_age_s=100)) as room:
        box: Box[Any] = Box()
        room.store.put("a", digest_of(b"x" * 900), 0, 900, b"x" * 10, box)
        room.wait(box)
        with pytest.raises(ResourceExhaustedError):
            room.store.put("a", digest_of(b"y" * 900), 0, 900, b"y" * 10, ignore)
        (partial,) = (tmp_path / "s/partial").glob("*/*")
        os.utime(partial, (room.wall_s - 101, room.wall_s - 101))
        room.store.sweep()
        assert not partial.exists()
        assert room.store.bytes_stored == 0
        assert put(room, "a", b"y" * 900) == (900, True)


def test_an_upload_of_anothers_bytes_changes_nothing_for_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither reads the file again for the other's sake, so neither can tell by the time of its next load."""
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        put(room, "a", DATA)
        read: list[str] = []
        monkeypatch.setattr(room.files, "verify", lambda _path, digest: read.append(digest))
        for tenant in ("a", "b", "a"):
            if tenant == "b":
                put(room, "b", DATA)
            room.store.open(tenant, digest_of(DATA), box)
            assert room.wait(box) == room.files.path(digest_of(DATA))
        room.store.open("b", digest_of(DATA), box)
        room.wait(box)
        assert read == []
        replaced = tmp_path / "s" / "replaced"
        assert list(replaced.iterdir())
        room.store.tidy()
        room.run_until(lambda: not list(replaced.iterdir()))
        assert room.files.path(digest_of(DATA)).read_bytes() == DATA


def test_a_tenant_that_goes_while_it_uploads_costs_another_owner_nothing_after_a_crash(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        put(room, "a", DATA)
        box: Box[Any] = Box()
        room.store.put("b", digest_of(DATA), 0, len(DATA), DATA, box)
        room.run_until(lambda: (tmp_path / "s" / "replaced" / "1").exists())
        room.store.drop_tenant("b")
        room.wait(box)
        room.settle()
    with rooms(tmp_path / "s") as room:
        assert room.store.stat("a", digest_of(DATA)) == (True, len(DATA))
        assert room.store.stat("b", digest_of(DATA)) == (False, 0)
