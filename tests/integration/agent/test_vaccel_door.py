"""vAccel's protocol on the agent's port: what an unchanged vAccel guest sends and must get back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from agent_process import AgentProcess, Guest, running_agent, wait_until
from remora.errors import (
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.wire import vaccel
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client

SYNC, ASYNC = vaccel.SERVICES


class VaccelGuest:
    """One vAccel connection with a session."""

    def __init__(self, agent: AgentProcess, service: str = SYNC) -> None:
        self._client = Client(agent.connect(), max_message_bytes=64 << 20)
        self._service = service
        answer = self.call("CreateSession", vaccel.SessionCreateRequest(flags=2))
        assert isinstance(answer, vaccel.SessionCreateResponse)
        self.session = answer.session_id

    def call(self, method: str, request: Message) -> object:
        answer = vaccel.METHODS[method][1] if method in vaccel.METHODS else vaccel.Empty
        return self._client.call(self._service, method, request, answer, timeout_s=30)

    def register(self, *data: bytes, kind: int = vaccel.ResourceType.DATA, **values: object) -> int:
        blobs = [
            vaccel.ResourceBlob(type_=vaccel.BlobType.MAPPED, name=f"b{index}", data=piece)
            for index, piece in enumerate(data)
        ]
        request = vaccel.ResourceRegisterRequest(session_id=self.session, resource_type=kind, blobs=blobs, **values)
        answer = self.call("RegisterResource", request)
        assert isinstance(answer, vaccel.ResourceRegisterResponse)
        return answer.resource_id

    def sync(self, number: int) -> list[bytes]:
        answer = self.call("SyncResource", vaccel.ResourceSyncRequest(resource_id=number))
        assert isinstance(answer, vaccel.ResourceSyncResponse)
        assert all(blob.size == len(blob.data) for blob in answer.blobs)
        return [bytes(blob.data) for blob in answer.blobs]

    def close(self) -> None:
        self._client.close()


@pytest.fixture(params=vaccel.SERVICES)
def guest(agent: AgentProcess, request: pytest.FixtureRequest) -> Iterator[VaccelGuest]:
    opened = VaccelGuest(agent, request.param)
    yield opened
    opened.close()


def errno_of(error: RemoraError) -> int | None:
    """Return what a vAccel client takes from an error."""
    (detail,) = error.details
    assert detail.type_url == vaccel.ERROR_TYPE_URL
    decoded: int | None = vaccel.Error.decode(detail.value).ffi_error
    return decoded


def test_the_documented_bytes_open_a_session(agent: AgentProcess) -> None:
    """The byte vector is upstream's: CreateSession(flags = 2) on stream 1."""
    request = (
        bytes.fromhex("00000033 00000001 01 00 0a1e")
        + b"vaccel.sync.agent.AgentService"
        + bytes.fromhex("120d")
        + b"CreateSession"
        + bytes.fromhex("1a02 0802")
    )
    with agent.connect() as sock:
        sock.sendall(request)
        size, stream, kind, flags = struct.unpack(">IIBB", sock.recv(10))
        body = sock.recv(size)
    assert (stream, kind, flags) == (1, 2, 0)
    assert body.startswith(bytes.fromhex("0a00 12"))


def test_session_ids_are_positive_and_cannot_be_guessed(guest: VaccelGuest) -> None:
    answers = [guest.call("CreateSession", vaccel.SessionCreateRequest()) for _ in range(10)]
    numbers = [answer.session_id for answer in answers if isinstance(answer, vaccel.SessionCreateResponse)]
    assert all(0 < number < 1 << 63 for number in numbers)
    assert max(numbers) > 1 << 50


def test_a_session_is_updated_and_destroyed(guest: VaccelGuest) -> None:
    guest.call("UpdateSession", vaccel.SessionUpdateRequest(session_id=guest.session, flags=1))
    guest.call("DestroySession", vaccel.SessionDestroyRequest(session_id=guest.session))
    with pytest.raises(NotFoundError) as caught:
        guest.call("UpdateSession", vaccel.SessionUpdateRequest(session_id=guest.session))
    assert caught.value.message == f"Unknown session {guest.session}"
    assert not caught.value.details


def test_a_session_belongs_to_its_identity_and_not_to_its_connection(agent: AgentProcess, guest: VaccelGuest) -> None:
    other = VaccelGuest(agent)
    other.call("UpdateSession", vaccel.SessionUpdateRequest(session_id=guest.session))
    other.close()


def test_blobs_come_back_in_their_order(guest: VaccelGuest) -> None:
    pieces = [b"first", b"second" * 100_000, b"first"]
    number = guest.register(*pieces)
    assert number > 0
    assert guest.sync(number) == pieces


def test_a_resource_is_shared_between_sessions_and_destroyed_with_its_last_use(
    agent: AgentProcess, guest: VaccelGuest
) -> None:
    number = guest.register(b"shared")
    second = VaccelGuest(agent)
    again = second.register(resource_id=number)
    assert again == number
    request = vaccel.ResourceUnregisterRequest(resource_id=number, session_id=guest.session)
    guest.call("UnregisterResource", request)
    assert second.sync(number) == [b"shared"]
    with pytest.raises(InternalError) as caught:
        guest.call("UnregisterResource", request)
    assert errno_of(caught.value) == 22
    second.call("UnregisterResource", vaccel.ResourceUnregisterRequest(resource_id=number, session_id=second.session))
    with pytest.raises(NotFoundError, match=f"Unknown resource {number}"):
        second.sync(number)
    second.close()


def test_a_resource_outlives_the_session_that_made_it(agent: AgentProcess, guest: VaccelGuest) -> None:
    number = guest.register(b"stays")
    guest.call("DestroySession", vaccel.SessionDestroyRequest(session_id=guest.session))
    second = VaccelGuest(agent)
    assert second.register(resource_id=number) == number
    assert second.sync(number) == [b"stays"]
    second.close()


def test_a_guests_paths_are_never_opened_on_the_host(guest: VaccelGuest) -> None:
    request = vaccel.ResourceRegisterRequest(session_id=guest.session, paths=["/etc/passwd"])
    with pytest.raises(PermissionDeniedError) as caught:
        guest.call("RegisterResource", request)
    assert errno_of(caught.value) == 13


def test_neither_paths_nor_blobs_is_invalid(guest: VaccelGuest) -> None:
    with pytest.raises(InvalidArgumentError):
        guest.register()


@pytest.mark.parametrize("number", [0, -1])
def test_ids_that_cannot_be_are_internal_errors_with_a_detail_as_upstream(guest: VaccelGuest, number: int) -> None:
    with pytest.raises(InternalError) as caught:
        guest.call("DestroySession", vaccel.SessionDestroyRequest(session_id=number))
    (detail,) = caught.value.details
    assert vaccel.Error.decode(detail.value).type == vaccel.ErrorType.INVALID_ARGUMENT


def test_file_blobs_and_empty_blobs_are_invalid(guest: VaccelGuest) -> None:
    for blob in (
        vaccel.ResourceBlob(type_=vaccel.BlobType.FILE, data=b"x"),
        vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER),
    ):
        request = vaccel.ResourceRegisterRequest(session_id=guest.session, resource_type=1, blobs=[blob])
        with pytest.raises(InternalError) as caught:
            guest.call("RegisterResource", request)
        assert errno_of(caught.value) == 22


def picture() -> bytes:
    stream = BytesIO()
    Image.effect_noise((300, 200), 80).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def test_a_picture_is_classified_into_1024_bytes_of_text(agent: AgentProcess, guest: VaccelGuest) -> None:
    image = picture()
    answer = guest.call("ImageClassification", vaccel.ImageRequest(session_id=guest.session, image=image))
    assert isinstance(answer, vaccel.ImageResponse)
    tags = bytes(answer.tags)
    assert len(tags) == 1024
    assert tags[-1:] == b"\0"
    from remora.wire import remora_v1

    with Guest(agent.connect()) as native:
        request = remora_v1.ClassifyRequest(model="efficientnet-lite0", image=image, top=1)
        labels = native.call("Classify", request, remora_v1.ClassifyResponse).labels
    assert tags.rstrip(b"\0").decode() == labels[0].name


def test_what_is_no_picture_carries_an_errno(guest: VaccelGuest) -> None:
    with pytest.raises(InternalError) as caught:
        guest.call("ImageClassification", vaccel.ImageRequest(session_id=guest.session, image=b"no picture"))
    assert errno_of(caught.value) == 22


def test_too_many_sessions_are_eusers_and_leases_end(tmp_path: Path, models: Path) -> None:
    config = "[limits]\nsessions_per_tenant = 2\nlease_s = 1\n"
    with running_agent(tmp_path, config=config, models=models) as agent:
        guest = VaccelGuest(agent)
        guest.call("CreateSession", vaccel.SessionCreateRequest())
        with pytest.raises(ResourceExhaustedError) as caught:
            guest.call("CreateSession", vaccel.SessionCreateRequest())
        assert errno_of(caught.value) == 87
        number = guest.session
        guest.close()
        second = VaccelGuest(agent)
        second.close()
        wait_until(lambda: sessions(agent) == 0, "sessions that nobody uses end")
        third = VaccelGuest(agent)
        with pytest.raises(NotFoundError):
            third.call("UpdateSession", vaccel.SessionUpdateRequest(session_id=number))
        third.close()


def sessions(agent: AgentProcess) -> int:
    from remora.wire import control_v1

    return agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse).sessions


def test_sessions_and_resources_survive_a_killed_agent(tmp_path: Path, models: Path) -> None:
    with running_agent(tmp_path, models=models) as agent:
        guest = VaccelGuest(agent)
        number, session = guest.register(b"kept", b"bytes"), guest.session
        guest.close()
        agent.kill()
        agent.start()
        second = VaccelGuest(agent)
        second.call("UpdateSession", vaccel.SessionUpdateRequest(session_id=session))
        assert second.sync(number) == [b"kept", b"bytes"]
        second.close()
