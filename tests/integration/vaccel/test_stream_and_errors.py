"""GenopStream in chunks, the error status of each failure, and tenants who know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agent_process import AgentProcess
from remora.wire import vaccel
from vaccel_google import GoogleClient, RemoteError
from vaccel_schema import METHODS

UINT8, RAW = 9, 0
ARRAYCOPY = bytes([18])
CHUNK = 1 << 20


def chunks(client: GoogleClient, field: str, data: bytes, **changed: Any) -> list[Any]:
    parts = -(-len(data) // CHUNK)
    return [
        client.message(
            "genop.Request",
            session_id=0,
            **{
                field: [
                    client.arg(
                        data[index * CHUNK : (index + 1) * CHUNK],
                        RAW,
                        **{"size": len(data), "parts": parts, "part_no": index + 1} | changed,
                    )
                ]
            },
        )
        for index in range(parts)
    ]


def first(client: GoogleClient, session: int) -> Any:
    return client.message("genop.Request", session_id=session, read_args=[client.arg(ARRAYCOPY, UINT8)])


def test_arguments_larger_than_a_message_come_in_chunks(client: GoogleClient, session: int) -> None:
    data = bytes(range(256)) * 4 * 2500 + b"end!"
    empty = client.message("genop.Request", session_id=session)
    messages = [first(client, session), empty, *chunks(client, "read_args", data)]
    answer = client.stream([*messages, *chunks(client, "write_args", bytes(len(data)))])
    (out,) = answer.write_args
    assert out.buf == data
    assert (out.size, out.parts, out.part_no) == (len(data), 0, 0)


def test_a_stream_leaves_nothing_behind(client: GoogleClient, session: int) -> None:
    """More bytes in all than a tenant may have in flight at once."""
    data = bytes(4 << 20)
    for _ in range(8):
        messages = [first(client, session), *chunks(client, "read_args", data), *chunks(client, "write_args", data)]
        assert len(client.stream(messages).write_args[0].buf) == len(data)
    for _ in range(8):
        with pytest.raises(RemoteError, match="in the middle"):
            client.stream([first(client, session), *chunks(client, "read_args", data)[:-1]])


def test_chunks_that_do_not_fit_together_are_refused(client: GoogleClient, session: int) -> None:
    data = bytes(3 * CHUNK)
    good = chunks(client, "read_args", data)
    whole = first(client, session)
    broken = [
        [whole, good[0], good[2]],
        [whole, good[1]],
        [whole, *good[:2]],
        [whole, good[0], whole],
        [whole, good[0], *chunks(client, "write_args", data)],
        [whole, *chunks(client, "read_args", data, size=2 * CHUNK)],
        [whole, *chunks(client, "read_args", data, size=4 * CHUNK)],
        [whole, *chunks(client, "read_args", data, parts=2)],
    ]
    for messages in broken:
        with pytest.raises(RemoteError) as caught:
            client.stream(messages)
        assert caught.value.code == 13
    with pytest.raises(RemoteError, match=r"limits\.in_flight_bytes_per_tenant") as caught:
        client.stream([whole, *chunks(client, "read_args", bytes(10), size=(1 << 32) - 1)])
    assert (caught.value.code, caught.value.errno) == (8, 11)
    assert client.stream([whole, *good, *chunks(client, "write_args", data)]).write_args[0].buf == data


@pytest.mark.parametrize("method", [name for name, (request, _) in METHODS.items() if name != "CreateSession"])
def test_every_method_knows_only_real_sessions(client: GoogleClient, method: str) -> None:
    values: dict[str, Any] = {"resource_id": 99} if method == "SyncResource" else {"session_id": 99}
    if method == "TorchModelRun":
        values["nr_out_tensors"] = 1
    if method == "GetProfiler":
        assert not client.call(method, **values).HasField("profiler")
        return
    with pytest.raises(RemoteError, match=r"^\(5, 'Unknown (session|resource) 99'") as caught:
        client.call(method, **values)
    assert (caught.value.code, caught.value.error) == (5, None)
    impossible: dict[str, Any] = {**values, **dict.fromkeys(values.keys() - {"nr_out_tensors"}, -1)}
    with pytest.raises(RemoteError) as caught:
        client.call(method, **impossible)
    assert (caught.value.code, caught.value.error.type) == (13, 2)


def test_unknown_methods_and_services_have_their_builds_status(connect: Callable[..., GoogleClient]) -> None:
    for service, code in ((vaccel.SYNC_SERVICE, 3), (vaccel.ASYNC_SERVICE, 12), ("vaccel.other.AgentService", 12)):
        with pytest.raises(RemoteError) as caught:
            connect(service).call("Nonsense")
        assert (caught.value.code, caught.value.error) == (code, None)


def test_a_payload_that_is_no_message_costs_only_its_call(client: GoogleClient, session: int) -> None:
    for method in METHODS:
        with pytest.raises(RemoteError) as caught:
            client.call(method, raw=b"\x0a\xff\xff")
        assert caught.value.code in (2, 13)
    client.call("UpdateSession", session_id=session)


def test_neither_paths_nor_blobs_is_status_3_without_details(client: GoogleClient, session: int) -> None:
    with pytest.raises(RemoteError, match="No paths or blobs") as caught:
        client.call("RegisterResource", session_id=session, resource_type=1)
    assert (caught.value.code, caught.value.error) == (3, None)


def test_a_tenant_cannot_use_or_tell_apart_another_tenants_numbers(
    agent: AgentProcess, connect: Callable[..., GoogleClient], identity: bytes
) -> None:
    sockets = [agent.attach(f"guest{index}") for index in range(2)]
    one, two = (connect(vaccel.SYNC_SERVICE, path) for path in sockets)
    mine, theirs = (client.call("CreateSession").session_id for client in (one, two))
    blob = one.message("resource.Blob", type_=1, name="model", data=identity)
    model = one.call("RegisterResource", session_id=mine, resource_type=2, blobs=[blob]).resource_id
    one.call("TorchModelLoad", session_id=mine, model_id=model)
    foreign: list[tuple[str, dict[str, Any]]] = [
        ("UpdateSession", {"session_id": mine}),
        ("DestroySession", {"session_id": mine}),
        ("SyncResource", {"resource_id": model}),
        ("RegisterResource", {"session_id": theirs, "resource_id": model}),
        ("UnregisterResource", {"session_id": theirs, "resource_id": model}),
        ("TorchModelLoad", {"session_id": theirs, "model_id": model}),
        ("TensorflowModelUnload", {"session_id": theirs, "model_id": model}),
        ("TorchModelRun", {"session_id": theirs, "model_id": model, "nr_out_tensors": 1}),
        ("Genop", {"session_id": mine}),
    ]
    for method, values in foreign:
        with pytest.raises(RemoteError) as caught:
            two.call(method, **values)
        numbers = {mine, model} & set(values.values())
        assert (caught.value.code, caught.value.error) == (5, None), method
        assert caught.value.message in {f"Unknown session {n}" for n in numbers} | {
            f"Unknown resource {n}" for n in numbers
        }
    assert not two.call("GetProfiler", session_id=mine).HasField("profiler")
    one.call("SyncResource", resource_id=model)
