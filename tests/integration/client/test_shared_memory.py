"""The SDK with an agent that shares memory: nobody can tell, but by the time it takes."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import remora
from agent_process import AgentProcess, catalogue_directory, running_agent, wait_until
from remora import aio
from remora.client.inference import Inference
from remora.client.region import Region
from remora.errors import DeadlineExceededError, ResourceExhaustedError

Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    models = catalogue_directory()
    with (
        tempfile.TemporaryDirectory(prefix="remora-share-") as directory,
        running_agent(Path(directory), models=models) as agent,
    ):
        yield agent


@pytest.fixture
def session(agent: AgentProcess) -> Iterator[remora.Session]:
    with remora.connect(agent.address, call_timeout_s=30) as session:
        yield session


def tensor(seed: int = 0, side: int = 256) -> Array:
    return np.random.default_rng(seed).random((1, 1, side, side), dtype="float32")


def echo(session: remora.Session, given: Array) -> Array:
    found: Array = session.infer("identity", {"input": given})["output"]
    return found


def region_of(session: remora.Session) -> Region:
    connection = session._link._connection
    assert connection is not None
    assert connection.region is not None
    return connection.region


def test_results_stay_what_they_are_while_more_come(session: remora.Session) -> None:
    given = [tensor(number) for number in range(12)]
    found = [echo(session, one) for one in given]
    for one, other in zip(given, found, strict=True):
        assert (one == other).all()


def test_a_result_is_the_callers_to_write_to(session: remora.Session) -> None:
    echo(session, tensor())
    found = echo(session, tensor())
    found += 1
    assert (echo(session, tensor()) == tensor()).all()
    assert (found == tensor() + 1).all()


def test_memory_goes_round_when_results_are_dropped(session: remora.Session) -> None:
    given = tensor()
    for _ in range(300):
        assert echo(session, given)[0, 0, 0, 0] == given[0, 0, 0, 0]
    gc.collect()
    region = region_of(session)
    assert region.take([region.size_bytes]) == [(0, region.size_bytes)]


def test_a_view_of_a_result_keeps_its_memory(session: remora.Session) -> None:
    given = tensor(7)
    echo(session, given)
    row = echo(session, given)[0, 0, 3]
    for number in range(40):
        echo(session, tensor(number))
    assert (row == given[0, 0, 3]).all()


def test_more_results_than_there_is_memory_come_through_the_socket(session: remora.Session) -> None:
    given = [tensor(number, 1024) for number in range(24)]  # 4 MiB each
    found = [echo(session, one) for one in given]
    assert all((one == other).all() for one, other in zip(given, found, strict=True))


def test_a_small_tensor_goes_through_the_socket_where_memory_is_shared(session: remora.Session) -> None:
    echo(session, tensor())
    region = region_of(session)
    free = region.take([region.size_bytes])  # all of it: whatever needs a place gets none
    small = tensor(side=4)
    request = Inference("identity", {"input": small}, None, 1)
    assert request.shared_bytes == 0
    connection = session._link._connection
    assert connection is not None
    assert session._link._region(connection, request) is None
    assert (echo(session, small) == small).all()
    assert free is not None
    region.give_back(*free[0])


def test_plain_buffers_are_shared_too(session: remora.Session) -> None:
    given = tensor()
    plain = remora.Tensor(given.tobytes(), "float32", given.shape)
    for _ in range(3):
        assert session.infer("identity", {"input": plain})["output"] == plain


def test_threads_get_their_own_answers(session: remora.Session) -> None:
    wrong: list[int] = []

    def call(number: int) -> None:
        given = tensor(number)
        for _ in range(20):
            if not (echo(session, given) == given).all():
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_session_goes_on_when_the_agent_is_killed_and_comes_back(agent: AgentProcess, tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="remora-share-") as directory,
        running_agent(Path(directory), models=catalogue_directory()) as other,
        remora.connect(other.address, call_timeout_s=30) as session,
    ):
        given = tensor()
        kept = [echo(session, given) for _ in range(3)]
        before = region_of(session)
        other.kill()
        other.start()
        assert (echo(session, given) == given).all()
        assert (echo(session, given) == given).all()
        assert region_of(session) is not before
        assert all((one == given).all() for one in kept)


def test_calls_that_are_given_up_harm_no_others(session: remora.Session) -> None:
    given = tensor()
    for _ in range(2):
        echo(session, given)
    for _ in range(5):
        with pytest.raises((DeadlineExceededError, ResourceExhaustedError)):
            session.infer("identity", {"input": given}, deadline=1e-7)
    wait_until(lambda: (echo(session, given) == given).all(), "answers come again")


def test_a_fork_leaves_parent_and_child_their_own_results(session: remora.Session) -> None:
    given = tensor(3)
    echo(session, given)
    mine = echo(session, given)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        good = b"n"
        try:
            mine[...] = 5  # the child's own from here on
            if (echo(session, given) == given).all() and (mine == 5).all():
                good = b"y"
        finally:
            os.write(writer, good)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        assert answers.read() == b"y"
    os.waitpid(pid, 0)
    assert (mine == given).all()
    for number in range(4):
        assert (echo(session, tensor(number)) == tensor(number)).all()


def test_the_asyncio_session_shares_as_well(agent: AgentProcess) -> None:
    async def run() -> None:
        async with aio.connect(agent.address) as session:
            given = [tensor(number) for number in range(16)]

            async def one(number: int) -> None:
                for _ in range(5):
                    found = (await session.infer("identity", {"input": given[number]}))["output"]
                    assert (found == given[number]).all()

            await asyncio.gather(*(one(number) for number in range(16)))
            connection = session._link._connection
            assert connection is not None
            assert connection.region is not None
            cancelled = asyncio.ensure_future(session.infer("identity", {"input": given[0]}))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait({cancelled})
            await one(1)

    asyncio.run(run())


def test_an_agent_that_shares_nothing_is_as_good(tmp_path: Path) -> None:
    config = "[limits]\nshared_bytes_per_connection = 0\n"
    with (
        tempfile.TemporaryDirectory(prefix="remora-share-") as directory,
        running_agent(Path(directory), config=config, models=catalogue_directory()) as agent,
        remora.connect(agent.address) as session,
    ):
        for number in range(3):
            assert (echo(session, tensor(number)) == tensor(number)).all()
        connection = session._link._connection
        assert connection is not None
        assert connection.region is None
