"""Sessions: tokens, who may resume or fork, leases, and what survives a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_rooms import Box, Rooms, rooms
from remora.agent.identity import Identity, of_sandbox
from remora.agent.policy import Limits
from remora.agent.sessions import Session
from remora.errors import NotFoundError, ResourceExhaustedError

ALICE = Identity("uid:1", "uid:1")
BOB = Identity("uid:2", "uid:2")
TEMPLATE = of_sandbox("template", "", {}, "", True)
CLONE = of_sandbox("clone", "", {}, "template", False)


def ignore(_outcome: object) -> None:
    """Nobody waits."""


def create(room: Rooms, identity: Identity) -> tuple[Session, bytes]:
    box: Box[Any] = Box()
    room.sessions.create(identity, box)
    outcome: tuple[Session, bytes] = room.wait(box)
    return outcome


def test_a_token_resumes_its_own_session(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        session, token = create(room, ALICE)
        assert len(token) >= 16
        assert room.sessions.resume(ALICE, token) is session


def test_a_token_is_worth_nothing_to_another_identity(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        _session, token = create(room, ALICE)
        assert room.sessions.resume(BOB, token) is None
        assert not room.sessions.fork(BOB, token, ignore)
        assert room.sessions.resume(ALICE, b"guess") is None


def test_the_token_is_not_written_down(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        _session, token = create(room, ALICE)
    for path in (tmp_path / "s").glob("journal*"):
        assert token not in path.read_bytes()


def test_a_session_outlives_its_connection_by_its_lease(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", limits=Limits(lease_s=60)) as room:
        session, token = create(room, ALICE)
        room.sessions.connected(session)
        room.now_s += 1000
        room.sessions.expire()
        assert not session.ended
        room.sessions.disconnected(session)
        room.now_s += 59
        room.sessions.expire()
        assert room.sessions.resume(ALICE, token) is session
        room.now_s += 2
        room.sessions.expire()
        assert room.sessions.resume(ALICE, token) is None
        assert room.ended == [session]


def test_a_clone_forks_its_templates_session(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        session, token = create(room, TEMPLATE)
        room.sessions.add_model(session, "efficientnet-lite0", "")
        box: Box[Any] = Box()
        assert room.sessions.resume(CLONE, token) is None
        assert room.sessions.fork(CLONE, token, box)
        copy, new_token = room.wait(box)
        assert copy is not session
        assert new_token != token
        assert copy.models == {"efficientnet-lite0": ""}
        assert copy.tenant == CLONE.tenant
        copy.models["other"] = "onnx"
        assert "other" not in (session.models or {})


def test_only_a_templates_session_can_be_forked_and_only_by_its_clones(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        plain = of_sandbox("template", "", {}, "", False)
        _session, token = create(room, plain)
        assert not room.sessions.fork(CLONE, token, ignore)
        _session, token = create(room, TEMPLATE)
        stranger = of_sandbox("other", "", {}, "elsewhere", False)
        assert not room.sessions.fork(stranger, token, ignore)


def test_a_templates_session_has_no_lease(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        session, _token = create(room, TEMPLATE)
        room.now_s += 1e6
        room.sessions.expire()
        assert not session.ended


def test_sessions_survive_a_restart_with_what_they_hold(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        session, token = create(room, ALICE)
        added: Box[Any] = Box()
        room.store.add("uid:1", b"model", added)
        digest = room.wait(added)
        room.sessions.hold(session, digest)
        room.sessions.add_model(session, digest, "onnx")
    with rooms(tmp_path / "s") as room:
        again = room.sessions.resume(ALICE, token)
        assert again is not None
        assert again.id == session.id
        assert again.holds == {digest}
        assert again.models == {digest: "onnx"}


def test_an_ended_session_is_gone_after_a_restart(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        session, token = create(room, ALICE)
        room.sessions.end(session)
        room.sessions.end(session)
        assert room.ended == [session]
    with rooms(tmp_path / "s") as room:
        assert room.sessions.resume(ALICE, token) is None
        assert len(room.sessions) == 0


def test_too_many_sessions_are_refused_by_name(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", limits=Limits(sessions_per_tenant=1)) as room:
        session, _token = create(room, ALICE)
        room.sessions.connected(session)
        with pytest.raises(ResourceExhaustedError, match=r"limits\.sessions_per_tenant"):
            room.sessions.create(ALICE, ignore)
        create(room, BOB)


def test_a_callers_own_disconnected_session_makes_room_for_its_next(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", limits=Limits(sessions_per_tenant=2)) as room:
        oldest, token = create(room, ALICE)
        _second, _token = create(room, ALICE)
        create(room, ALICE)
        assert oldest.ended
        assert room.sessions.resume(ALICE, token) is None


def test_too_many_models_are_refused_by_name(tmp_path: Path) -> None:
    with rooms(tmp_path / "s", limits=Limits(models_per_session=1)) as room:
        session, _token = create(room, ALICE)
        room.sessions.add_model(session, "one", "")
        room.sessions.add_model(session, "one", "")
        with pytest.raises(ResourceExhaustedError, match=r"limits\.models_per_session"):
            room.sessions.add_model(session, "two", "")


def test_a_numbered_session_belongs_to_its_identity_and_its_number_cannot_be_guessed(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        numbers = []
        for _ in range(20):
            room.sessions.create_numbered(ALICE, box)
            numbers.append(room.wait(box).number)
        assert all(0 < number < 1 << 63 for number in numbers)
        assert len(set(numbers)) == 20
        assert max(numbers) > 1 << 40
        assert room.sessions.numbered(ALICE, numbers[0]).number == numbers[0]
        with pytest.raises(NotFoundError, match=f"Unknown session {numbers[0]}"):
            room.sessions.numbered(BOB, numbers[0])


def test_a_clone_finds_its_templates_numbered_session_as_a_copy_of_its_own(tmp_path: Path) -> None:
    with rooms(tmp_path / "s") as room:
        box: Box[Any] = Box()
        room.sessions.create_numbered(TEMPLATE, box)
        original = room.wait(box)
        copy = room.sessions.numbered(CLONE, original.number)
        assert copy is not original
        assert copy.owner == CLONE.key
        assert room.sessions.numbered(CLONE, original.number) is copy
        room.sessions.end(copy)
        assert room.sessions.numbered(TEMPLATE, original.number) is original
        room.settle()
