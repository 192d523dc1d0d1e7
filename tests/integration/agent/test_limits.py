"""Each limit that a client can run into refuses by its name, and leaves other tenants alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, identity_request, running_agent, wait_until
from remora.errors import RemoraError, ResourceExhaustedError
from remora.wire import remora_v1

CONFIG = """
[limits]
connections_per_tenant = 3
queue_length_per_tenant = 2
idle_timeout_s = 2
models_per_session = 1
resources_per_tenant = 2
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("l"), config=CONFIG, models=models) as running:
        yield running


def test_one_connection_too_many_is_told_which_limit(small: AgentProcess) -> None:
    other = small.attach("other")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Guest(small.connect()))
        with pytest.raises(ResourceExhaustedError, match=r"limits\.connections_per_tenant"):
            Guest(small.connect())
        stack.enter_context(Guest(small.connect(other)))
    small.detach("other")


def test_a_full_queue_is_told_as_such(small: AgentProcess) -> None:
    refusals: list[RemoraError] = []
    with Guest(small.connect()) as guest:
        guest.infer("identity")
        picture = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=bytes(602112))
        request = remora_v1.InferRequest(model="efficientnet-lite0", inputs=[picture])

        def work() -> None:
            try:
                guest.call("Infer", request, remora_v1.InferResponse)
            except RemoraError as error:
                refusals.append(error)

        work()  # the model is loaded now
        assert not refusals
        threads = [threading.Thread(target=work) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refusals
        assert all("limits.queue_length_per_tenant" in error.message for error in refusals)
        guest.call("Infer", identity_request("identity"), remora_v1.InferResponse)


def test_too_many_models_and_resources_are_told_as_such(small: AgentProcess, identity_model: bytes) -> None:
    import hashlib

    # ONNX readers skip fields they do not know: other bytes, the same model.
    variants = [identity_model + b"\xfa\x3f" + bytes([4]) + f"no {index}".encode() for index in range(3)]
    digests = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in variants]
    with Guest(small.connect()) as guest:
        for digest, data in zip(digests[:2], variants, strict=False):
            guest.upload(digest, data)
        with pytest.raises(ResourceExhaustedError, match=r"limits\.resources_per_tenant"):
            guest.upload(digests[2], variants[2])
        guest.load(digests[0])
        with pytest.raises(ResourceExhaustedError, match=r"limits\.models_per_session"):
            guest.load(digests[1])


def test_an_idle_connection_is_closed_and_its_session_stays(small: AgentProcess) -> None:
    with Guest(small.connect()) as guest:
        token = guest.token
        wait_until(lambda: "limits.idle_timeout_s" in small.log, "the idle connection is closed")
        with pytest.raises(RemoraError):
            guest.ping()
    with Guest(small.connect(), token) as again:
        assert again.hello.resumed
