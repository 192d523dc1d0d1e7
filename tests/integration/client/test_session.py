"""The blocking session against a fake agent: what each call does when all goes well, and when an argument is wrong."""

from __future__ import annotations

import array
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import remora
from fake_agent import FakeAgent, Gate, fail, silence
from remora.wire import remora_v1 as v1


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "a.sock") as agent:
        yield agent


@pytest.fixture
def session(agent: FakeAgent) -> Iterator[remora.Session]:
    with remora.connect(agent.address, call_timeout_s=10) as session:
        yield session


def test_a_session_is_opened_and_closed_at_the_agent(agent: FakeAgent) -> None:
    with remora.connect(agent.address) as session:
        assert (session.agent, session.id) == ("fake/1", "session-0")
        assert list(session.operations) == ["classify", "infer"]
        assert len(agent.sessions) == 1
    assert agent.sessions == {}
    session.close()
    with pytest.raises(remora.FailedPreconditionError, match="closed"):
        session.ping()


def test_a_picture_is_classified_from_any_source(session: remora.Session, tmp_path: Path) -> None:
    picture = os.urandom(5000)
    path = tmp_path / "p.jpg"
    path.write_bytes(picture)
    expected = session.classify(picture, top=3)
    assert [label.index for label in expected] == [0, 1, 2]
    assert isinstance(expected[0], remora.Label)
    with path.open("rb") as file:
        for image in (path, str(path), file, io.BytesIO(picture), memoryview(picture)):
            assert session.classify(image, top=3) == expected


@pytest.mark.parametrize("top", [0, -1, True, 1.5])
def test_a_wrong_number_of_labels_is_refused_before_it_is_sent(session: remora.Session, top: int) -> None:
    with pytest.raises(remora.InvalidArgumentError, match="top"):
        session.classify(b"x", top=top)


def test_numpy_arrays_are_answered_with_numpy_arrays(session: remora.Session) -> None:
    given = np.arange(12, dtype="float32").reshape(3, 4)
    found = session.infer("identity", {"x": given})["x"]
    assert isinstance(found, np.ndarray)
    assert (found == given).all()
    assert isinstance(session.infer("identity", {"x": given}, arrays=False)["x"], remora.Tensor)


def test_buffers_are_answered_with_tensors(session: remora.Session) -> None:
    found = session.infer("identity", {"x": array.array("f", [1, 2]), "y": remora.Tensor(b"abcd", "uint8", (2, 2))})
    assert found["x"].tolist() == [1, 2]
    assert found["y"].tolist() == [[97, 98], [99, 100]]
    assert isinstance(session.infer("identity", {"x": b"1"}, arrays=True)["x"], np.ndarray)


def test_only_the_wanted_outputs_come(session: remora.Session) -> None:
    given = {"x": b"1", "y": b"2"}
    assert list(session.infer("identity", given, outputs=["y"])) == ["y"]
    with pytest.raises(remora.InvalidArgumentError, match="list"):
        session.infer("identity", given, outputs="y")


def test_a_tensor_of_many_megabytes_comes_back_unchanged(session: remora.Session) -> None:
    given = np.frombuffer(os.urandom(12 << 20), dtype="uint8")
    assert (session.infer("identity", {"x": given})["x"] == given).all()


def test_a_message_beyond_the_agents_limit_is_refused_with_the_limit(agent: FakeAgent, session: remora.Session) -> None:
    with pytest.raises(remora.InvalidArgumentError, match=str(agent.max_message_bytes)):
        session.infer("identity", {"x": bytes(agent.max_message_bytes + 1)})
    assert session.ping() > 0


def test_the_models_are_listed_with_what_they_expect(session: remora.Session) -> None:
    info = {model.name: model for model in session.models()}["identity"]
    assert info.inputs == (remora.TensorSpec("x", "float32", (-1, 4)),)
    assert info.licence == "Apache-2.0"


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_a_model_is_uploaded_in_chunks_once_and_used(
    agent: FakeAgent, session: remora.Session, tmp_path: Path, form: str
) -> None:
    data = os.urandom(5 * v1.CHUNK_BYTES // 2)
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    model = session.load(path if form == "path" else data)
    assert [len(put.data) for put in agent.called("PutResource")] == [1 << 20, 1 << 20, 1 << 19]
    assert bytes(agent.resources[model.name]) == data
    assert model.inputs[0].name == model.outputs[0].name == "x"
    assert model.infer({"x": b"1"})["x"].tolist() == [49]
    assert session.infer(model, {"x": b"1"})["x"].tolist() == [49]
    session.load(data)
    assert len(agent.called("PutResource")) == 3
    model.unload()
    with pytest.raises(remora.NotFoundError):
        model.infer({"x": b"1"})


def test_a_model_of_the_catalogue_is_loaded_by_name(session: remora.Session) -> None:
    assert session.model("identity").infer({"x": b"1"})["x"].tolist() == [49]
    with pytest.raises(remora.NotFoundError, match="nothing-of-that-name"):
        session.model("nothing-of-that-name")


def test_an_upload_goes_on_where_an_earlier_one_stopped(agent: FakeAgent, session: remora.Session) -> None:
    data = os.urandom(3 * v1.CHUNK_BYTES)
    name = remora.client.source.Source(data).digest
    agent.resources[name] = bytearray(data[: v1.CHUNK_BYTES])
    session.load(data)
    assert [put.offset for put in agent.called("PutResource")] == [1 << 20, 2 << 20]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (remora.PermissionDeniedError("rule x"), remora.PermissionDeniedError),
        (remora.ResourceExhaustedError("quota y"), remora.ResourceExhaustedError),
        (remora.AbortedError("killed two workers"), remora.AbortedError),
        (remora.InternalError("bug"), remora.InternalError),
    ],
)
def test_the_agents_error_reaches_the_caller_and_is_not_retried(
    agent: FakeAgent, session: remora.Session, error: remora.RemoraError, expected: type[remora.RemoraError]
) -> None:
    agent.plan("Infer", fail(error))
    with pytest.raises(expected, match=error.message):
        session.infer("identity", {"x": b"1"})
    assert len(agent.called("Infer")) == 1


def test_a_deadline_ends_a_call_to_a_silent_agent_and_the_next_call_works(
    agent: FakeAgent, session: remora.Session
) -> None:
    agent.plan("Infer", silence)
    with pytest.raises(remora.DeadlineExceededError):
        session.infer("identity", {"x": b"1"}, deadline=0.05)
    assert session.infer("identity", {"x": b"1"})["x"].tolist() == [49]
    assert len(agent.connections) == 1


def test_a_connection_that_died_silently_is_replaced_after_a_deadline(
    agent: FakeAgent, session: remora.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remora.client.link.PROBE_TIMEOUT_S", 0.05)
    agent.plan("Infer", silence)
    agent.plan("Noop", silence)
    with pytest.raises(remora.DeadlineExceededError):
        session.infer("identity", {"x": b"1"}, deadline=0.05)
    assert session.infer("identity", {"x": b"1"})["x"].tolist() == [49]
    assert len(agent.connections) == 2


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_that_is_none_is_refused(session: remora.Session, deadline: float) -> None:
    with pytest.raises(remora.InvalidArgumentError, match="seconds"):
        session.infer("identity", {"x": b"1"}, deadline=deadline)


def test_calls_of_many_threads_are_under_way_at_once_on_one_connection(
    agent: FakeAgent, session: remora.Session
) -> None:
    count, gate = 32, Gate()
    agent.plan("Infer", *[gate] * count)
    answers: dict[int, object] = {}

    def call(number: int) -> None:
        answers[number] = session.infer("identity", {"x": bytes([number])})["x"].tolist()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    gate.wait_for(count)
    gate.open()
    for thread in threads:
        thread.join(10)
    assert answers == {number: [number] for number in range(count)}
    assert len(agent.connections) == 1
    assert len({request.request_id for request in agent.called("Infer")}) == count


def test_without_an_agent_the_error_says_what_was_tried_and_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(remora.UnavailableError, match=r"no agent found.*no such socket.*remora agent --listen"):
        remora.connect(f"unix://{tmp_path}/none.sock")


def test_a_listener_that_never_answers_hello_ends_with_an_error(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.plan("Hello", *[silence] * 10)
    with pytest.raises((remora.UnavailableError, remora.DeadlineExceededError), match="did not answer Hello"):
        remora.connect(agent.address, timeout_s=0.2)
