"""containerd's own ttrpc at the other end: the agent's errors in its terms, and `remora.vaccel` at its server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, catalogue_directory, running_agent
from go_peer import Peer, build, wait_for
from remora.vaccel import Arg, ArgType, FFIError, Session, config, link
from remora.wire import vaccel


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
