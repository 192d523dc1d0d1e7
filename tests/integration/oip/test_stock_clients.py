"""Triton's own Python clients, unchanged, over HTTP and gRPC; their answers are the native door's, bit for bit."""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_process import Guest
from remora.wire import remora_v1

triton_http = pytest.importorskip("tritonclient.http", reason="tritonclient is missing: pip install tritonclient[all]")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing: pip install tritonclient[all]")

PICTURE = np.random.default_rng(7).random((1, 3, 224, 224), dtype=np.float32)


class Forwarder(socketserver.ThreadingTCPServer):
    """From a TCP port to a Unix socket: what a guest runs for clients that only know TCP."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(("127.0.0.1", 0), _Forwarded)


class _Forwarded(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Forwarder)
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(self.server.path))
            up = threading.Thread(target=_copy, args=(self.request, agent))
            up.start()
            _copy(agent, self.request)
            up.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other end is gone: there is nothing left to carry


@pytest.fixture(scope="module")
def forwarder(agent: Any) -> Iterator[int]:
    with Forwarder(agent.oip_socket) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(params=["http-tcp", "http-forwarded", "grpc-unix", "grpc-tcp"])
def stock(request: pytest.FixtureRequest, agent: Any, forwarder: int) -> Iterator[tuple[Any, Any]]:
    """(client module, client)"""
    module = triton_http if request.param.startswith("http") else triton_grpc
    url = f"unix:{agent.oip_socket}" if request.param == "grpc-unix" else f"127.0.0.1:{agent.oip_port}"
    client = module.InferenceServerClient(f"127.0.0.1:{forwarder}" if request.param == "http-forwarded" else url)
    yield module, client
    client.close()


def tensor(module: Any, values: Any, datatype: str = "FP32") -> Any:
    given = module.InferInput("input", list(values.shape), datatype)
    given.set_data_from_numpy(values)
    return given


def test_the_server_and_its_models_are_live_and_ready(stock: tuple[Any, Any]) -> None:
    _module, client = stock
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("identity")
    assert client.is_model_ready("identity", "1")
    assert not client.is_model_ready("no-such-model")


def test_metadata_says_what_a_model_takes(stock: tuple[Any, Any]) -> None:
    module, client = stock
    if module is triton_grpc:
        server, model = client.get_server_metadata(as_json=True), client.get_model_metadata("identity", as_json=True)
    else:
        server, model = client.get_server_metadata(), client.get_model_metadata("identity")
    assert server["name"] == "remora"
    assert model["inputs"][0]["name"] == "input"
    assert model["inputs"][0]["datatype"] == "FP32"


def test_a_binary_tensor_comes_back_as_the_native_door_gives_it(stock: tuple[Any, Any], agent: Any) -> None:
    module, client = stock
    for _ in range(20):
        answer = client.infer("identity", [tensor(module, PICTURE)]).as_numpy("output")
        assert answer.tobytes() == PICTURE.tobytes()
    given = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=PICTURE.tobytes())
    for model in ("identity", "efficientnet-lite0"):
        with Guest(agent.connect()) as guest:
            name = guest.load(model).model.inputs[0].name  # type: ignore[union-attr]
            given.name = name
            request = remora_v1.InferRequest(model=model, inputs=[given])
            native = guest.call("Infer", request, remora_v1.InferResponse).outputs[0]
        asked = module.InferInput(name, [1, 3, 224, 224], "FP32")
        asked.set_data_from_numpy(PICTURE)
        answer = client.infer(model, [asked]).as_numpy(native.name)
        assert answer.tobytes() == bytes(native.data)


def test_errors_say_what_is_wrong(stock: tuple[Any, Any]) -> None:
    from tritonclient.utils import InferenceServerException

    module, client = stock
    with pytest.raises(InferenceServerException, match="no-such-model"):
        client.infer("no-such-model", [tensor(module, PICTURE)])
    with pytest.raises(InferenceServerException, match="version"):
        client.infer("identity", [tensor(module, PICTURE)], model_version="7")
    with pytest.raises(InferenceServerException):
        client.infer("identity", [tensor(module, PICTURE.astype(np.float64), "FP64")])
    with pytest.raises(InferenceServerException, match="BYTES"):
        client.infer("identity", [tensor(module, np.array([b"x"], dtype=np.object_), "BYTES")])
    with pytest.raises(InferenceServerException, match=r"ModelConfig|model_configuration"):
        client.get_model_config("identity")
    with pytest.raises(InferenceServerException, match=r"SystemSharedMemoryStatus|system_shared_memory"):
        client.get_system_shared_memory_status()
    assert client.is_server_live()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_asynchronous_clients_pass_as_well(agent: Any, kind: str) -> None:
    from tritonclient.utils import InferenceServerException

    module = triton_http if kind == "http" else triton_grpc
    aio = pytest.importorskip(f"tritonclient.{kind}.aio")
    url = f"127.0.0.1:{agent.oip_port}" if kind == "http" else f"unix:{agent.oip_socket}"

    async def use() -> None:
        async with aio.InferenceServerClient(url) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("identity")
            model = await client.get_model_metadata("identity")
            assert (model["name"] if kind == "http" else model.name) == "identity"
            answers = await asyncio.gather(*(client.infer("identity", [tensor(module, PICTURE)]) for _ in range(8)))
            assert {answer.as_numpy("output").tobytes() for answer in answers} == {PICTURE.tobytes()}
            with pytest.raises(InferenceServerException, match="no-such-model"):
                await client.infer("no-such-model", [tensor(module, PICTURE)])

    asyncio.run(use())
