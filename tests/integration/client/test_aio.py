"""The asyncio session: the same promises as the blocking one, for tasks instead of threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import remora
import remora.aio
from fake_agent import Action, FakeAgent, Gate, drop, drop_after, fail, garbage, silence, truncate
from remora.client import ready
from remora.wire import remora_v1 as v1

MODEL = os.urandom(3 * v1.CHUNK_BYTES + 17)
Body = Callable[[remora.AsyncSession], Awaitable[None]]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "a.sock") as agent:
        yield agent


def with_session(agent: FakeAgent, body: Body, **options: float) -> None:
    async def main() -> None:
        async with remora.aio.connect(agent.address, **{"call_timeout_s": 20, **options}) as session:
            await body(session)

    asyncio.run(main())


async def infer(session: remora.AsyncSession, data: bytes = b"1", deadline: float | None = None) -> object:
    return (await session.infer("identity", {"x": data}, deadline=deadline))["x"].tolist()


def test_every_call_has_the_names_and_results_of_the_blocking_session(agent: FakeAgent, tmp_path: Path) -> None:
    picture = tmp_path / "p.jpg"
    picture.write_bytes(b"picture")
    public = [name for name in dir(remora.Session) if not name.startswith("_")]
    assert public == [name for name in dir(remora.AsyncSession) if not name.startswith("_")]

    async def body(session: remora.AsyncSession) -> None:
        with remora.connect(agent.address) as blocking:
            assert await session.classify(picture, top=2) == blocking.classify(picture, top=2)
            assert await session.models() == blocking.models()
        given = np.arange(4, dtype="float32")
        assert ((await session.infer("identity", {"x": given}))["x"] == given).all()
        assert await session.ping() > 0
        assert session.agent == "fake/1"
        model = await session.load(MODEL)
        assert (await model.infer({"x": b"1"}))["x"].tolist() == [49]
        await model.unload()
        with pytest.raises(remora.NotFoundError):
            await model.infer({"x": b"1"})
        assert (await session.model("identity")).name == "identity"

    with_session(agent, body)
    assert agent.sessions == {}


def test_a_session_is_awaited_and_closed_by_hand(agent: FakeAgent) -> None:
    async def main() -> None:
        session = await remora.aconnect(agent.address)
        assert await infer(session) == [49]
        await session.close()
        await session.close()
        with pytest.raises(remora.FailedPreconditionError, match="closed"):
            await session.ping()

    asyncio.run(main())
    assert agent.sessions == {}


def test_many_requests_are_under_way_at_once_on_one_connection(agent: FakeAgent) -> None:
    count, gate = 100, Gate()
    agent.plan("Infer", *[gate] * count)

    async def body(session: remora.AsyncSession) -> None:
        calls = [asyncio.ensure_future(infer(session, bytes([number]))) for number in range(count)]
        await asyncio.get_running_loop().run_in_executor(None, gate.wait_for, count)
        gate.open()
        assert await asyncio.gather(*calls) == [[number] for number in range(count)]

    with_session(agent, body)
    assert len(agent.connections) == 1


def test_a_cancelled_task_leaves_the_session_usable_and_other_tasks_alone(agent: FakeAgent) -> None:
    gate = Gate()
    agent.plan("Infer", gate, gate)

    async def body(session: remora.AsyncSession) -> None:
        cancelled = asyncio.ensure_future(infer(session, b"1"))
        other = asyncio.ensure_future(infer(session, b"2"))
        await asyncio.get_running_loop().run_in_executor(None, gate.wait_for, 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        gate.open()
        assert await other == [50]
        assert await infer(session, b"3") == [51]

    with_session(agent, body)
    assert len(agent.connections) == 1


@pytest.mark.parametrize("action", [drop, drop_after, truncate])
def test_a_request_whose_connection_ends_is_answered_once_under_the_same_id(agent: FakeAgent, action: Action) -> None:
    agent.plan("Infer", action, action)

    async def body(session: remora.AsyncSession) -> None:
        assert await infer(session) == [49]

    with_session(agent, body)
    assert len({request.request_id for request in agent.called("Infer")}) == 1
    assert list(agent.runs.values()) == [1]
    assert len(agent.connections) == 3


def test_many_tasks_get_their_own_answers_while_connections_end(agent: FakeAgent) -> None:
    count, each = 16, 12
    chaos = [drop, drop_after, truncate]
    agent.plan("Infer", *[chaos[n // 7 % 3] if n % 7 == 3 else None for n in range(count * each)])

    async def body(session: remora.AsyncSession) -> None:
        async def many(number: int) -> None:
            for turn in range(each):
                assert await infer(session, bytes([number, turn])) == [number, turn]

        await asyncio.gather(*(many(number) for number in range(count)))

    with_session(agent, body)
    assert len(agent.runs) == count * each
    assert set(agent.runs.values()) == {1}


def test_an_agent_that_forgot_everything_gets_the_model_again(agent: FakeAgent) -> None:
    async def body(session: remora.AsyncSession) -> None:
        model = await session.load(MODEL)
        agent.stop()
        agent.forget_sessions()
        agent.forget_resources()
        agent.start()
        assert (await model.infer({"x": b"1"}))["x"].tolist() == [49]
        assert bytes(agent.resources[model.name]) == MODEL

    with_session(agent, body)


@pytest.mark.parametrize("action", [drop, drop_after, truncate])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_an_upload_that_is_cut_goes_on_from_what_arrived(agent: FakeAgent, action: Action, chunk: int) -> None:
    agent.plan("PutResource", *[None] * chunk, action)

    async def body(session: remora.AsyncSession) -> None:
        model = await session.load(MODEL)
        assert bytes(agent.resources[model.name]) == MODEL

    with_session(agent, body)


def test_a_clone_reconnects_before_its_next_request(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(session: remora.AsyncSession) -> None:
        assert await infer(session) == [49]
        monkeypatch.setattr(ready, "_generation", ready.generation() + 1)
        assert await infer(session) == [49]

    with_session(agent, body)
    assert len(agent.connections) == 2
    assert bytes(agent.called("Hello")[1].token)


def test_a_deadline_ends_a_call_to_a_silent_agent(agent: FakeAgent) -> None:
    agent.plan("Infer", silence)

    async def body(session: remora.AsyncSession) -> None:
        with pytest.raises(remora.DeadlineExceededError):
            await infer(session, deadline=0.05)
        assert await infer(session) == [49]

    with_session(agent, body)
    assert len(agent.connections) == 1


def test_an_agent_that_stays_away_ends_calls_after_the_reconnect_time(agent: FakeAgent) -> None:
    async def body(session: remora.AsyncSession) -> None:
        agent.stop()
        results = await asyncio.gather(session.ping(), session.ping(), return_exceptions=True)
        assert [type(result) for result in results] == [remora.UnavailableError] * 2
        with pytest.raises(remora.DeadlineExceededError, match=r"no such socket|nobody listens"):
            await infer(session, deadline=0.05)
        agent.start()
        assert await session.ping() > 0

    with_session(agent, body, reconnect_s=0.2)


def test_closing_a_session_ends_a_call_that_waits_for_an_agent(agent: FakeAgent) -> None:
    async def main() -> None:
        session = await remora.aio.connect(agent.address)
        agent.stop()
        waiting = asyncio.ensure_future(session.ping())
        await asyncio.sleep(0)
        await session.close()
        with pytest.raises(remora.FailedPreconditionError, match="closed"):
            await waiting

    asyncio.run(main())


def test_the_agents_errors_and_garbage_reach_the_caller(agent: FakeAgent) -> None:
    agent.plan("Infer", fail(remora.PermissionDeniedError("rule x")), garbage)

    async def body(session: remora.AsyncSession) -> None:
        with pytest.raises(remora.PermissionDeniedError, match="rule x"):
            await infer(session)
        with pytest.raises(remora.ProtocolError):
            await infer(session)
        assert await infer(session) == [49]

    with_session(agent, body)


def test_without_an_agent_the_error_says_what_was_tried(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(remora.UnavailableError, match=r"no agent found.*no such socket"):
            await remora.aio.connect(f"unix://{tmp_path}/none.sock")

    asyncio.run(main())


def test_a_forwarder_that_drops_the_first_connections_is_tried_again(agent: FakeAgent) -> None:
    agent.plan("Hello", drop, drop)

    async def body(session: remora.AsyncSession) -> None:
        assert await infer(session) == [49]

    with_session(agent, body)
