"""Connections that end at the worst moments, agents that restart and forget: a caller gets an answer, and only one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import remora
from fake_agent import Action, FakeAgent, Gate, drop, drop_after, fail, garbage, silence, truncate
from remora.client import ready
from remora.wire import remora_v1 as v1

MODEL = os.urandom(3 * v1.CHUNK_BYTES + 17)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "a.sock") as agent:
        yield agent


@pytest.fixture
def session(agent: FakeAgent) -> Iterator[remora.Session]:
    with remora.connect(agent.address, call_timeout_s=20) as session:
        yield session


def infer(session: remora.Session, data: bytes = b"1", deadline: float | None = None) -> object:
    return session.infer("identity", {"x": data}, deadline=deadline)["x"].tolist()


@pytest.mark.parametrize("action", [drop, drop_after, truncate])
def test_a_request_whose_connection_ends_is_answered_once_under_the_same_id(
    agent: FakeAgent, session: remora.Session, action: Action
) -> None:
    agent.plan("Infer", action, action)
    assert infer(session) == [49]
    assert len({request.request_id for request in agent.called("Infer")}) == 1
    assert list(agent.runs.values()) == [1]
    assert len(agent.connections) == 3
    assert len(agent.sessions) == 1


def test_the_session_survives_a_restart_of_the_agent(agent: FakeAgent, session: remora.Session) -> None:
    before = session.id
    agent.stop()
    agent.start()
    assert infer(session) == [49]
    assert session.id == before


def test_a_call_waits_for_an_agent_that_is_down(agent: FakeAgent, session: remora.Session) -> None:
    agent.stop()
    started = threading.Thread(target=agent.start)
    threading.Timer(0.1, started.start).start()
    assert infer(session) == [49]
    started.join(10)


def test_an_agent_that_forgot_the_session_gets_the_model_named_again_but_not_sent_again(
    agent: FakeAgent, session: remora.Session
) -> None:
    model = session.load(MODEL)
    before, sent = session.id, len(agent.called("PutResource"))
    agent.stop()
    agent.forget_sessions()
    agent.start()
    assert model.infer({"x": b"1"})["x"].tolist() == [49]
    assert session.id != before
    assert len(agent.called("PutResource")) == sent


def test_an_agent_that_forgot_everything_gets_the_model_again(
    agent: FakeAgent, session: remora.Session, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    path.write_bytes(MODEL)
    model = session.load(path)
    agent.stop()
    agent.forget_sessions()
    agent.forget_resources()
    agent.start()
    assert session.infer(model.name, {"x": b"1"})["x"].tolist() == [49]
    assert bytes(agent.resources[model.name]) == MODEL


def test_a_model_that_is_lost_within_a_session_is_loaded_again(agent: FakeAgent, session: remora.Session) -> None:
    model = session.load(MODEL)
    for known in agent.sessions.values():
        known.models.clear()
    assert model.infer({"x": b"1"})["x"].tolist() == [49]


def test_a_model_file_that_changed_is_not_sent_under_its_old_name(
    agent: FakeAgent, session: remora.Session, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    path.write_bytes(MODEL)
    model = session.load(path)
    path.write_bytes(b"other")
    agent.forget_sessions()
    agent.forget_resources()
    agent.drop_connections()
    with pytest.raises(remora.FailedPreconditionError, match="changed"):
        model.infer({"x": b"1"})
    assert infer(session) == [49]


@pytest.mark.parametrize("action", [drop, drop_after, truncate])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_an_upload_that_is_cut_goes_on_from_what_arrived(
    agent: FakeAgent, session: remora.Session, action: Action, chunk: int
) -> None:
    agent.plan("PutResource", *[None] * chunk, action)
    model = session.load(MODEL)
    assert bytes(agent.resources[model.name]) == MODEL
    offsets = [put.offset for put in agent.called("PutResource")]
    assert offsets[0] == 0
    assert sum(offset == 0 for offset in offsets) <= 2


def test_an_upload_whose_beginning_was_lost_starts_again(agent: FakeAgent, session: remora.Session) -> None:
    gate = Gate()
    agent.plan("PutResource", None, gate)

    def forget() -> None:
        gate.wait_for(1)
        agent.forget_resources()
        gate.open()

    agent.spawn(forget)
    model = session.load(MODEL)
    assert bytes(agent.resources[model.name]) == MODEL


def test_an_upload_that_never_gets_on_ends_with_the_reason(agent: FakeAgent, session: remora.Session) -> None:
    agent.plan("PutResource", *[fail(remora.FailedPreconditionError("a gap")) for _ in range(100)])
    with pytest.raises(remora.InvalidArgumentError, match="byte 0"):
        session.load(MODEL)
    assert infer(session) == [49]


def test_many_threads_get_their_own_answers_while_connections_end(agent: FakeAgent, session: remora.Session) -> None:
    count, each = 8, 25
    chaos = [drop, drop_after, truncate]
    agent.plan("Infer", *[chaos[n // 7 % 3] if n % 7 == 3 else None for n in range(count * each)])
    wrong: list[object] = []

    def call(number: int) -> None:
        for turn in range(each):
            data = bytes([number, turn])
            if infer(session, data) != list(data):
                wrong.append((number, turn))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(agent.runs) == count * each
    assert set(agent.runs.values()) == {1}
    assert len(agent.sessions) == 1


def test_an_agent_that_stays_away_ends_calls_after_the_reconnect_time(agent: FakeAgent) -> None:
    with remora.connect(agent.address, reconnect_s=0.2) as session:
        agent.stop()
        with pytest.raises(remora.UnavailableError, match=r"did not come back within 0.2 s") as caught:
            session.ping()
        assert caught.value.fix
        agent.start()
        assert session.ping() > 0


def test_a_deadline_ends_the_waiting_for_an_agent_and_tells_why(agent: FakeAgent, session: remora.Session) -> None:
    agent.stop()
    with pytest.raises(remora.DeadlineExceededError, match=r"no such socket|nobody listens"):
        infer(session, deadline=0.1)


def test_closing_a_session_ends_a_call_that_waits_for_an_agent(agent: FakeAgent) -> None:
    session = remora.connect(agent.address)
    agent.stop()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            session.ping()
        except remora.RemoraError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    session.close()
    thread.join(5)
    assert [type(error) for error in errors] == [remora.FailedPreconditionError]


def test_an_agent_that_is_busy_shutting_down_is_asked_again(agent: FakeAgent, session: remora.Session) -> None:
    agent.plan("Infer", fail(remora.UnavailableError("draining")), fail(remora.UnavailableError("draining")))
    assert infer(session) == [49]
    agent.plan("Infer", *[fail(remora.UnavailableError("draining"))] * 10)
    with pytest.raises(remora.UnavailableError, match="draining"):
        infer(session)


def test_a_forwarder_that_drops_the_first_connections_is_tried_again(agent: FakeAgent) -> None:
    agent.plan("Hello", drop, drop)
    with remora.connect(agent.address) as session:
        assert infer(session) == [49]


def test_a_forwarder_that_drops_every_connection_ends_with_an_error(agent: FakeAgent) -> None:
    agent.plan("Hello", *[drop] * 10)
    with pytest.raises(remora.UnavailableError):
        remora.connect(agent.address)


def test_an_answer_that_is_garbage_is_an_error_and_the_session_goes_on(
    agent: FakeAgent, session: remora.Session
) -> None:
    agent.plan("Infer", garbage)
    with pytest.raises(remora.ProtocolError):
        infer(session)
    assert infer(session) == [49]


def test_a_clone_reconnects_before_its_next_request_and_forks_the_session(
    agent: FakeAgent, session: remora.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = session.load(MODEL)
    parent, token = session.id, next(iter(agent.sessions))
    # What the agent knows after the template's microVM is gone and this clone is attached in its place.
    agent.parents[token] = agent.sessions.pop(token)
    monkeypatch.setattr(ready, "_generation", ready.generation() + 1)
    sent = len(agent.called("LoadModel"))
    assert model.infer({"x": b"1"})["x"].tolist() == [49]
    assert session.id != parent
    assert bytes(agent.called("Hello")[-1].token) == token
    assert len(agent.called("LoadModel")) == sent


def test_ctrl_c_during_a_call_leaves_a_usable_session(agent: FakeAgent, session: remora.Session) -> None:
    gate = Gate()
    agent.plan("Infer", gate)

    def interrupt() -> None:
        gate.wait_for(1)
        os.kill(os.getpid(), signal.SIGINT)

    agent.spawn(interrupt)
    with pytest.raises(KeyboardInterrupt):
        infer(session)
    gate.open()
    assert infer(session, b"2") == [50]


def test_ctrl_c_in_one_thread_does_not_cost_another_its_answer(agent: FakeAgent, session: remora.Session) -> None:
    gate = Gate()
    agent.plan("Infer", gate, gate)
    answers: list[object] = []
    other = threading.Thread(target=lambda: answers.append(infer(session, b"2")))
    other.start()

    def interrupt() -> None:
        gate.wait_for(2)
        os.kill(os.getpid(), signal.SIGINT)

    agent.spawn(interrupt)
    with pytest.raises(KeyboardInterrupt):
        infer(session)
    gate.open()
    other.join(10)
    assert answers == [[50]]


FORK = """
import os, sys
import remora

session = remora.connect(sys.argv[1])
model = session.load(b"a model")
first = session.id
pid = os.fork()
if pid == 0:
    ok = model.infer({"x": b"child"})["x"].tolist() == list(b"child") and session.id != first
    session.close()
    os._exit(0 if ok else 1)
answers = [session.infer("identity", {"x": b"parent"})["x"].tolist() == list(b"parent") for _ in range(50)]
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
same = session.id == first and session.ping() > 0
session.close()
sys.exit(0 if all(answers) and same and status == 0 else 1)
"""


def test_a_forked_child_has_a_session_of_its_own(agent: FakeAgent) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", FORK, agent.address], check=True, timeout=30)
    assert len(agent.connections) == 2
    assert bytes(agent.called("Hello")[1].token) == b""
    assert agent.sessions == {}


def test_a_silent_agent_does_not_hold_a_call_beyond_its_time(agent: FakeAgent) -> None:
    with remora.connect(agent.address, call_timeout_s=0.1) as session:
        agent.plan("Classify", silence)
        with pytest.raises(remora.DeadlineExceededError):
            session.classify(b"picture")
