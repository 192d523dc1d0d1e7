"""KServe's own Python clients, unchanged, over REST and gRPC.

The package brings 450 MB with it, so it is not among the development dependencies: `pip install kserve` to run these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

kserve = pytest.importorskip("kserve", reason="kserve is missing: pip install kserve (450 MB)")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

PICTURE = np.random.default_rng(9).random((1, 3, 224, 224), dtype=np.float32)
Client = tuple[Any, dict[str, Any]]


@pytest.fixture(params=["rest", "grpc-tcp", "grpc-unix"])
def stock(request: pytest.FixtureRequest, agent: Any) -> Callable[[Callable[[Client], Awaitable[Any]]], Any]:
    """Run a coroutine with (client, arguments that every call takes) in a loop of its own."""

    def run(use: Callable[[Client], Awaitable[Any]]) -> Any:
        async def within() -> Any:
            if request.param == "rest":
                from kserve.inference_client import RESTConfig

                client: Any = kserve.InferenceRESTClient(RESTConfig(protocol="v2", retries=1))
                arguments = {"base_url": f"http://127.0.0.1:{agent.oip_port}"}
            else:
                unix = request.param == "grpc-unix"
                url = f"unix:{agent.oip_socket}" if unix else f"127.0.0.1:{agent.oip_port}"
                client, arguments = kserve.InferenceGRPCClient(url=url, retries=0), {}
            try:
                return await use((client, arguments))
            finally:
                await client.close()

        return asyncio.run(within())

    return run


def request(values: Any, datatype: str = "FP32", model: str = "identity", *, binary: bool = True) -> Any:
    given = kserve.InferInput("input", list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    wanted = kserve.InferRequest(model_name=model, infer_inputs=[given])
    if binary:
        wanted.parameters = {"binary_data_output": True}
    return wanted


async def infer(stock: Client, wanted: Any) -> Any:
    client, arguments = stock
    if arguments:
        return await client.infer(data=wanted, model_name=wanted.model_name, **arguments)
    return await client.infer(wanted)


def test_live_and_ready(stock: Any) -> None:
    async def ask(client: Client) -> tuple[bool, ...]:
        made, arguments = client
        return (
            await made.is_server_live(**arguments),
            await made.is_server_ready(**arguments),
            await made.is_model_ready(model_name="identity", **arguments),
        )

    assert stock(ask) == (True, True, True)


@pytest.mark.parametrize("binary", [True, False])
def test_a_tensor_comes_back_as_it_went(stock: Any, binary: bool) -> None:
    values = PICTURE if binary else PICTURE[:, :, :8, :8]
    answer = stock(lambda client: infer(client, request(values, binary=binary)))
    assert answer.outputs[0].as_numpy().astype(np.float32).tobytes() == values.tobytes()


def test_errors_say_what_is_wrong(stock: Any) -> None:
    for wanted in (
        request(PICTURE, model="no-such-model"),
        request(PICTURE.astype(np.float64), "FP64"),
    ):
        with pytest.raises(Exception, match=r"no-such-model|input|FP64|float64|404|400"):  # each client has its own
            stock(lambda client, wanted=wanted: infer(client, wanted))
