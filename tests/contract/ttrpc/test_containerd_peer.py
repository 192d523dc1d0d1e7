"""containerd's own ttrpc at the other end: a client of all the agent's vAccel methods, a server of our client."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, catalogue_directory, running_agent
from go_peer import Peer, build, wait_for
from remora.vaccel import Arg, ArgType, FFIError, Session, config, link
from remora.wire import vaccel
from vaccel_schema import METHODS

UINT8, RAW = 9, 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="module")
def agent(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("g"), models=catalogue_directory()) as running:
        yield running


@pytest.fixture
def peer(program: Path, agent: AgentProcess, tmp_path: Path) -> Iterator[Peer]:
    with Peer(program, "client", agent.socket, tmp_path) as running:
        yield running


class Caller:
    """Makes calls that must succeed."""

    def __init__(self, peer: Peer, service: str) -> None:
        self.peer = peer
        self.service = service
        self.used: set[str] = set()

    def __call__(self, method: str, **values: Any) -> Any:
        return self.send(method, self.make(METHODS[method][0], **values))

    def send(self, method: str, *messages: Any) -> Any:
        self.used.add(method)
        code, text, _error, response = self.peer.call(self.service, method, *messages)
        assert code == 0, text
        return response

    def make(self, name: str, /, **values: Any) -> Any:
        return self.peer.schema.of(f"vaccel.{name}")(**values)

    def arg(self, data: bytes, kind: int, **values: Any) -> Any:
        return self.make("genop.Arg", buf=data, size=values.pop("size", len(data)), arg_type=kind, **values)


@pytest.mark.parametrize("service", vaccel.SERVICES)
def test_containerds_client_runs_every_method_of_the_agent(peer: Peer, service: str) -> None:
    from io import BytesIO

    from PIL import Image

    call = Caller(peer, service)
    session = call("CreateSession", flags=1).session_id
    call("UpdateSession", session_id=session, flags=2)
    model_file = (catalogue_directory() / "identity" / "model.onnx").read_bytes()
    blob = call.make("resource.Blob", type_=1, name="m", data=model_file)
    model = call("RegisterResource", session_id=session, resource_type=2, blobs=[blob]).resource_id
    assert call("SyncResource", resource_id=model).blobs[0].data == model_file
    value = struct.pack("<f", 1.5)
    for prefix, package, number in (("Torch", "torch", 7), ("Tensorflow", "tf", 1), ("TensorflowLite", "tflite", 1)):
        call(f"{prefix}ModelLoad", session_id=session, model_id=model)
        tensor = call.make(f"{package}.Tensor", data=value, dims=[1, 1, 1, 1], type=number)
        values: dict[str, Any] = {"nr_out_tensors": 1}
        if prefix == "Tensorflow":
            nodes = [call.make("tf.Node", name=name) for name in ("input", "output")]
            values = {"in_nodes": nodes[:1], "out_nodes": nodes[1:]}
        answer = call(f"{prefix}ModelRun", session_id=session, model_id=model, in_tensors=[tensor], **values)
        assert [out.data for out in answer.out_tensors] == [value]
        if prefix != "Torch":
            call(f"{prefix}ModelUnload", session_id=session, model_id=model)
    picture = BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture, "PNG")
    assert len(call("ImageClassification", session_id=session, image=picture.getvalue()).tags) == 1024
    opcode = call.arg(bytes([18]), UINT8)
    whole, room = call.arg(b"data", RAW), call.arg(bytes(4), RAW)
    answer = call("Genop", session_id=session, read_args=[opcode, whole], write_args=[room])
    assert answer.write_args[0].buf == b"data"
    chunks = [
        call.make("genop.Request", read_args=[call.arg(part, RAW, size=4, parts=2, part_no=number)])
        for number, part in ((1, b"da"), (2, b"ta"))
    ]
    messages = [call.make("genop.Request", session_id=session, read_args=[opcode]), *chunks]
    last = call.make("genop.Request", write_args=[room])
    assert call.send("GenopStream", *messages, last).write_args[0].buf == b"data"
    assert call("GetProfiler", session_id=session).profiler.component_name == "vaccel-rpc-agent"
    call("UnregisterResource", session_id=session, resource_id=model)
    call("DestroySession", session_id=session)
    assert call.used == set(METHODS)


def test_containerds_client_understands_the_agents_errors(peer: Peer) -> None:
    make = peer.schema.of
    for service, code in zip(vaccel.SERVICES, (3, 12), strict=True):
        assert peer.call(service, "Nonsense", make("vaccel.empty.Empty")())[0] == code
        answer = peer.call(service, "DestroySession", make("vaccel.session.DestroyRequest")(session_id=7))
        assert answer[:3] == (5, "Unknown session 7", None)
        session = peer.call(service, "CreateSession", make("vaccel.session.CreateRequest")())[3].session_id
        code, _text, error, _ = peer.call(
            service, "RegisterResource", make("vaccel.resource.RegisterRequest")(session_id=session, paths=["/x"])
        )
        assert (code, error.ffi_error) == (7, 13)
        code, _text, error, _ = peer.call(service, "Genop", make("vaccel.genop.Request")(session_id=session))
        assert (code, error.ffi_error) == (13, 22)
        stream = make("vaccel.genop.Request")(session_id=session)
        code, _text, error, _ = peer.call(service, "GenopStream", stream, stream)
        assert (code, error.ffi_error) == (13, 22)


def served(service: str, answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"service": service, "method": method, "stream": method == "GenopStream", "answer": {}, **Peer.types(method)}
        | answer
        for method, answer in answers.items()
    ]


@pytest.mark.parametrize("service", vaccel.SERVICES)
def test_our_client_works_with_containerds_server_under_either_name(
    program: Path, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "go.sock"
    out = {"writeArgs": [{"buf": "bmV3IQ==", "size": 4}]}
    answers: dict[str, dict[str, Any]] = {
        "CreateSession": {"answer": {"sessionId": "41"}},
        "UpdateSession": {},
        "DestroySession": {},
        "Genop": {"answer": out},
        "GenopStream": {"answer": out},
        "ImageClassification": {"code": 5, "message": "Unknown session 41"},
    }
    monkeypatch.setenv("VACCEL_RPC_ADDRESS", f"unix://{socket}")
    link.close()
    with Peer(program, "server", socket, tmp_path) as peer:
        peer.tell(served(service, answers))
        wait_for(socket)
        with Session(flags=0x4001) as session:
            assert peer.hear() == {"method": "CreateSession", "bytes": 2, "request": {"flags": 1}}
            assert session.remote_id == 41
            session.noop()
            assert peer.hear()["method"] == "UpdateSession"
            room = Arg(bytearray(b"old!"))
            session.genop([Arg(18, ArgType.UINT8)], [room])
            assert room.buf == b"new!"
            assert peer.hear()["method"] == "Genop"
            with pytest.raises(FFIError, match="EIO"):
                session.classify(b"x")
            peer.hear()
            if service == vaccel.ASYNC_SERVICE:
                session.genop([Arg(18, ArgType.UINT8), Arg(bytes(9 << 20), ArgType.RAW)], [room])
                messages = [peer.hear() for _ in range(5)]
                # Whole ones while they fit, then the large one in chunks that stock ttrpc takes, then the rest.
                assert [message["method"] for message in messages] == ["GenopStream"] * 5
                assert all(message["bytes"] < 4 << 20 for message in messages)
                parts = [arg.get("partNo") for message in messages for arg in message["request"].get("readArgs", [])]
                assert parts == [None, 1, 2, 3]
        config.cleanup()
