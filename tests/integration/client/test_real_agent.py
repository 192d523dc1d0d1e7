"""The SDK against the real agent, in processes of their own: what the fake agent promises must hold there, too."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import remora
from agent_process import AgentProcess, catalogue_directory, running_agent
from remora.client import ready

WAIT_S = 30


@pytest.fixture(scope="module")
def models() -> Path:
    return catalogue_directory()


@pytest.fixture(scope="module")
def agent(models: Path) -> Iterator[AgentProcess]:
    # Not below pytest's directories: a socket's path has a short limit.
    with (
        tempfile.TemporaryDirectory(prefix="remora-sdk-") as directory,
        running_agent(Path(directory), models=models) as agent,
    ):
        yield agent


@pytest.fixture
def session(agent: AgentProcess) -> Iterator[remora.Session]:
    with remora.connect(agent.address, call_timeout_s=WAIT_S) as session:
        yield session


def tensor(seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((1, 3, 64, 64), dtype="float32")


def test_ping_models_and_the_agents_name(session: remora.Session) -> None:
    assert 0 < session.ping() < WAIT_S
    assert "identity" in [model.name for model in session.models()]
    assert "infer" in session.operations
    assert session.agent


def test_a_tensor_comes_back_unchanged_with_and_without_numpy(session: remora.Session) -> None:
    given = tensor()
    assert (session.infer("identity", {"input": given})["output"] == given).all()
    plain = remora.Tensor(given.tobytes(), "float32", given.shape)
    assert session.infer("identity", {"input": plain})["output"] == plain


def test_a_large_tensor_is_neither_copied_on_its_way_out_nor_on_its_way_in(session: remora.Session) -> None:
    limit = session._link.continuity.max_message_bytes
    given = np.ones((1, 1, 1, (limit - 4096) // 4), dtype="float32")
    tracemalloc.start()
    try:
        found = session.infer("identity", {"input": given})["output"]
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < given.nbytes / 4
    assert (found == given).all()


def test_threads_get_their_own_answers(session: remora.Session) -> None:
    wrong: list[int] = []

    def call(number: int) -> None:
        given = tensor(number)
        if not (session.infer("identity", {"input": given})["output"] == given).all():
            wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []


def test_an_uploaded_model_is_used_and_survives_the_agents_death(
    agent: AgentProcess, session: remora.Session, models: Path
) -> None:
    model = session.load(models / "identity/model.onnx")
    given = tensor()
    assert (model.infer({"input": given})["output"] == given).all()
    agent.kill()
    agent.start()
    assert (model.infer({"input": given})["output"] == given).all()
    assert (session.infer("identity", {"input": given})["output"] == given).all()


def test_calls_under_way_survive_the_agents_death(agent: AgentProcess, session: remora.Session) -> None:
    done = threading.Event()
    counts = [0] * 4
    wrong: list[object] = []

    def call(number: int) -> None:
        given = tensor(number)
        try:
            while not done.is_set():
                if not (session.infer("identity", {"input": given})["output"] == given).all():
                    wrong.append(number)
                counts[number] += 1
        except remora.RemoraError as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        session.ping()
        agent.kill()
        agent.start()
        session.infer("identity", {"input": tensor()})
    done.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []
    assert all(counts)


def test_a_clone_goes_on_in_a_fork_of_its_templates_session(
    agent: AgentProcess, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = agent.attach("template", template=True)
    given = tensor()
    with remora.connect(f"unix://{template}", call_timeout_s=WAIT_S) as session:
        model = session.load(models / "identity/model.onnx")
        before = session.id
        clone = agent.attach("clone", parent="template")
        # What being cloned does to this process: the same path leads to another sandbox's socket.
        monkeypatch.setattr(session._link, "_addresses", [remora.client.address.parse(f"unix://{clone}")])
        monkeypatch.setattr(ready, "_generation", ready.generation() + 1)
        assert (model.infer({"input": given})["output"] == given).all()
        assert session.id != before
        assert session._link.continuity.forked
    agent.detach("clone")
    agent.detach("template")


def test_a_session_of_another_sandbox_is_not_resumed(agent: AgentProcess, models: Path) -> None:
    one, other = agent.attach("one"), agent.attach("other")
    with remora.connect(f"unix://{one}", call_timeout_s=WAIT_S) as session:
        model = session.load(models / "identity/model.onnx")
        with remora.connect(f"unix://{other}", call_timeout_s=WAIT_S) as thief:
            thief._link.continuity._token = session._link.continuity._token
            thief._link._connection.client.close()  # type: ignore[union-attr]
            with pytest.raises(remora.NotFoundError):
                thief.infer(model.name, {"input": tensor()})
            assert not thief._link.continuity.resumed
        assert (model.infer({"input": tensor()})["output"] == tensor()).all()
    agent.detach("one")
    agent.detach("other")


def test_photographs_are_classified_as_they_are_labelled(session: remora.Session, models: Path) -> None:
    pictures = sorted((models.parent / "photos").glob("[0-9][0-9]_*.jpg"))
    if not pictures:
        pytest.skip(f"no photographs in {models.parent / 'photos'}: make demo fetches them")
    right = [session.classify(path, top=1)[0].index == int(path.stem.split("_")[1]) for path in pictures]
    assert sum(right) >= 0.9 * len(right)


def test_what_the_caller_did_wrong_is_told(session: remora.Session) -> None:
    with pytest.raises(remora.InvalidArgumentError, match="input"):
        session.infer("identity", {"nonsense": tensor()})
    with pytest.raises(remora.NotFoundError, match="nothing-of-that-name"):
        session.infer("nothing-of-that-name", {"input": tensor()})
    with pytest.raises(remora.RemoraError):
        session.load(b"this is no model")
    assert session.ping() > 0


def test_a_message_beyond_the_agents_limit_is_refused(session: remora.Session) -> None:
    limit = session._link.continuity.max_message_bytes
    with pytest.raises(remora.InvalidArgumentError, match=str(limit)):
        session.infer("identity", {"input": np.zeros((1, 1, 1, limit // 4 + 1), dtype="float32")})


def test_the_command_line_reaches_the_agent(agent: AgentProcess) -> None:
    command = [sys.executable, "-m", "remora"]
    done = subprocess.run(
        [*command, "ping", "--count", "3", "--address", agent.address], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    assert "round trip" in done.stdout
    done = subprocess.run(
        [*command, "classify", __file__, "/nowhere.jpg", "--address", agent.address],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode != 0
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [__file__, "/nowhere.jpg"]
