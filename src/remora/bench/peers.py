"""The peers: other ways to hand the same tensor to another process and get it back, in the same run.

| peer | what it is |
|---|---|
| grpc_bytes | a Python gRPC server that answers bytes with the same bytes, on a Unix socket: no message, no array |
| grpc | the same server, as an identity model: Open Inference messages of protobuf, an array at both ends |
| all_cores | ONNX Runtime in this process with its own defaults: one run has all cores |
| triton_grpc, triton_http | Triton's stock clients against the agent's own Open Inference Protocol door |

All but `all_cores` need packages that only remora[dev] brings; what is not installed is left out.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from remora.catalog.entries import load_catalog

_BYTES, _TENSOR = "/remora.bench.Echo/Bytes", "/remora.bench.Echo/Tensor"
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]

Tensor = np.ndarray[Any, np.dtype[np.float32]]
Call = Callable[[], object]


def serve_grpc(address: str) -> None:
    """Echo until standard input ends; prints `ready` once it listens."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from tritonclient.grpc import service_pb2 as oip

    def tensor(request: Any, _context: object) -> Any:
        """Do what a server must: read an array, compute another one, write that."""
        given = request.inputs[0]
        array = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(given.shape).copy()
        output = {"name": "output", "datatype": "FP32", "shape": array.shape}
        return oip.ModelInferResponse(outputs=[output], raw_output_contents=[array.tobytes()])

    handlers = {
        _BYTES: grpc.unary_unary_rpc_method_handler(lambda message, _context: message),
        _TENSOR: grpc.unary_unary_rpc_method_handler(
            tensor, oip.ModelInferRequest.FromString, oip.ModelInferResponse.SerializeToString
        ),
    }

    class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types here
        def service(self, details: Any) -> Any:
            return handlers[details.method]

    server = grpc.server(ThreadPoolExecutor(2), handlers=(Echo(),), options=_OPTIONS)
    server.add_insecure_port(address)
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.stop(None).wait()


@contextmanager
def grpc_echo(directory: Path, tensor: Tensor) -> Iterator[dict[str, Call]]:
    """Start a gRPC echo process; yields calls that send the tensor and make an array of what comes back."""
    if find_spec("grpc") is None or find_spec("tritonclient") is None:
        yield {}
        return
    import grpc
    from tritonclient.grpc import service_pb2 as oip

    address = f"unix:{directory}/grpc.sock"
    command = [sys.executable, "-m", "remora.bench.peers", address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()
            with grpc.insecure_channel(address, options=_OPTIONS) as channel:
                echo = channel.unary_unary(_BYTES)
                infer = channel.unary_unary(
                    _TENSOR, oip.ModelInferRequest.SerializeToString, oip.ModelInferResponse.FromString
                )

                def call() -> object:
                    given = {"name": "input", "datatype": "FP32", "shape": tensor.shape}
                    request = oip.ModelInferRequest(inputs=[given], raw_input_contents=[tensor.tobytes()])
                    answer = infer(request)
                    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)

                yield {
                    "grpc_bytes": lambda: np.frombuffer(echo(tensor.tobytes()), np.float32).reshape(tensor.shape),
                    "grpc": call,
                }
        finally:
            process.stdin.close()


def all_cores(model: str, feeds: Mapping[str, Tensor]) -> dict[str, Call]:
    """Return a call that runs a catalogue model in this process, by ONNX Runtime as it comes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(load_catalog()[model].source.path.read_bytes())
    return {"all_cores": lambda: session.run(None, dict(feeds))}


def free_port() -> int:
    """Return a port of the loopback that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def triton(oip_path: Path, oip_port: int, model: str, name: str, tensor: Tensor) -> Iterator[dict[str, Call]]:
    """Yield calls of Triton's clients that run `model` on the tensor, through the agent's OIP door."""
    if find_spec("tritonclient") is None or find_spec("grpc") is None or find_spec("geventhttpclient") is None:
        yield {}
        return
    import tritonclient.grpc
    import tritonclient.http

    def call(kind: Any, client: Any) -> Call:
        def infer() -> object:
            given = kind.InferInput(name, list(tensor.shape), "FP32")
            given.set_data_from_numpy(tensor)
            return client.infer(model, [given]).as_numpy("output")

        return infer

    by_grpc = tritonclient.grpc.InferenceServerClient(f"unix:{oip_path}")
    by_http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{oip_port}")
    try:
        yield {
            "triton_grpc": call(tritonclient.grpc, by_grpc),
            "triton_http": call(tritonclient.http, by_http),
        }
    finally:
        by_grpc.close()
        by_http.close()


if __name__ == "__main__":
    serve_grpc(sys.argv[1])
