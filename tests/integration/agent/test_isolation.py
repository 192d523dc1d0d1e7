"""Two sandboxes on one agent: neither can name, use or detect what the other has."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator
from statistics import median

import pytest

from agent_process import AgentProcess, Guest, identity_request
from remora.errors import NotFoundError, RemoraError, ResourceExhaustedError
from remora.wire import control_v1, remora_v1, vaccel
from remora.wire.ttrpc.sync import Client

SERVICE = vaccel.SERVICES[0]


class Pair:
    """Two attached sandboxes, each with a native session and a vAccel connection."""

    def __init__(self, agent: AgentProcess) -> None:
        self.agent = agent
        self.alice_socket = agent.attach("alice")
        self.bob_socket = agent.attach("bob")
        self.alice = Guest(agent.connect(self.alice_socket))
        self.bob = Guest(agent.connect(self.bob_socket))
        self.alice_vaccel = Client(agent.connect(self.alice_socket))
        self.bob_vaccel = Client(agent.connect(self.bob_socket))

    def close(self) -> None:
        for connection in (self.alice, self.bob, self.alice_vaccel, self.bob_vaccel):
            connection.close()
        self.agent.detach("alice")
        self.agent.detach("bob")


@pytest.fixture
def pair(agent: AgentProcess) -> Iterator[Pair]:
    opened = Pair(agent)
    yield opened
    opened.close()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def refusal(action: object) -> tuple[int, str]:
    """Return code and message with which a request is refused."""
    with pytest.raises(RemoraError) as caught:
        action()  # type: ignore[operator]  # a function without arguments
    return caught.value.code, caught.value.message


def test_a_tenant_cannot_resume_another_tenants_session(pair: Pair) -> None:
    with Guest(pair.agent.connect(pair.bob_socket), pair.alice.token) as thief:
        assert not thief.hello.resumed
        assert not thief.hello.forked
        assert thief.hello.session_id != pair.alice.hello.session_id
    with Guest(pair.agent.connect(pair.bob_socket), b"a token that nobody has, 32 byte") as guesser:
        assert (guesser.hello.resumed, guesser.hello.forked) == (False, False)
    pair.alice.ping()


def test_a_tenant_cannot_tell_a_stolen_token_from_a_wrong_one(pair: Pair) -> None:
    answers = []
    for token in (pair.alice.token, bytes(32)):
        with Guest(pair.agent.connect(pair.bob_socket), token) as guest:
            hello = guest.hello
            answers.append((hello.resumed, hello.forked, len(hello.token), hello.lease_s, len(hello.session_id)))
    assert answers[0] == answers[1]


def test_a_tenant_cannot_use_a_session_by_its_public_name(pair: Pair) -> None:
    with Guest(pair.agent.connect(pair.bob_socket), pair.alice.hello.session_id.encode()) as thief:
        assert not thief.hello.resumed
    with Guest(pair.agent.connect(pair.bob_socket), bytes.fromhex(pair.alice.hello.session_id)) as thief:
        assert not thief.hello.resumed


def test_a_tenant_cannot_detect_that_another_has_a_resource(pair: Pair) -> None:
    data = b"what only alice has" * 1000
    assert pair.alice.upload(digest_of(data), data).complete
    theirs, nobodys = digest_of(data), digest_of(b"what nobody has")
    assert pair.bob.stat(theirs) == pair.bob.stat(nobodys)
    for name in ("Infer", "LoadModel"):
        answers = []
        for digest in (theirs, nobodys):
            request = identity_request(digest) if name == "Infer" else remora_v1.LoadModelRequest(model=digest)
            code, message = refusal(lambda request=request, name=name: pair.bob.call(name, request, remora_v1.Empty))
            answers.append((code, message.replace(digest, "")))
        assert answers[0] == answers[1]


def test_a_tenant_cannot_detect_a_resource_by_the_time_of_the_answer(pair: Pair) -> None:
    data = b"timing" * 10_000
    pair.alice.upload(digest_of(data), data)
    times: dict[str, list[float]] = {digest_of(data): [], digest_of(b"nobody"): []}
    for _ in range(300):
        for digest, taken in times.items():
            started_s = time.perf_counter()
            pair.bob.stat(digest)
            taken.append(time.perf_counter() - started_s)
    theirs, nobodys = (median(taken) for taken in times.values())
    assert theirs / nobodys == pytest.approx(1.0, abs=0.25)


def test_a_tenant_cannot_skip_an_upload_because_another_made_it(pair: Pair) -> None:
    data = bytes(range(256)) * 64
    pair.alice.upload(digest_of(data), data)
    request = remora_v1.PutResourceRequest(digest=digest_of(data), offset=0, total_bytes=len(data), data=data[:100])
    answer = pair.bob.call("PutResource", request, remora_v1.PutResourceResponse)
    assert (answer.received_bytes, answer.complete) == (100, False)
    request = remora_v1.PutResourceRequest(
        digest=digest_of(data), offset=100, total_bytes=len(data), data=bytes(len(data) - 100)
    )
    with pytest.raises(RemoraError, match="digest"):
        pair.bob.call("PutResource", request, remora_v1.PutResourceResponse)
    assert not pair.bob.stat(digest_of(data)).complete
    assert pair.alice.stat(digest_of(data)).complete


def test_a_tenant_cannot_run_another_tenants_model(pair: Pair, identity_model: bytes) -> None:
    digest = digest_of(identity_model)
    pair.alice.upload(digest, identity_model)
    pair.alice.load(digest)
    assert struct.unpack("<f", pair.alice.infer(digest, 5.0).outputs[0].data) == (5.0,)
    with pytest.raises(NotFoundError):
        pair.bob.infer(digest)
    with pytest.raises(NotFoundError):
        pair.bob.load(digest)
    names = [model.name for model in pair.bob.call("Models", remora_v1.Empty(), remora_v1.ModelsResponse).models]
    assert digest not in names


def test_a_tenant_cannot_unload_another_tenants_model(pair: Pair, identity_model: bytes) -> None:
    digest = digest_of(identity_model)
    for guest in (pair.alice, pair.bob):
        guest.upload(digest, identity_model)
        guest.load(digest)
    pair.bob.call("UnloadModel", remora_v1.UnloadModelRequest(model=digest), remora_v1.Empty)
    pair.alice.infer(digest)


def test_a_tenant_cannot_share_a_worker_with_what_another_uploaded(pair: Pair, identity_model: bytes) -> None:
    digest = digest_of(identity_model)
    for guest in (pair.alice, pair.bob):
        guest.upload(digest, identity_model)
        guest.load(digest)
    status = pair.agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
    workers = {worker.domain: worker.pid for worker in status.workers if digest in worker.models}
    assert set(workers) == {"sandbox:alice", "sandbox:bob"}
    assert len(set(workers.values())) == 2


def test_a_tenant_cannot_get_another_tenants_remembered_answer(pair: Pair) -> None:
    pair.alice.infer("identity", 11.0, request_id=77)
    answer = pair.bob.infer("identity", 22.0, request_id=77)
    assert struct.unpack("<f", answer.outputs[0].data) == (22.0,)


def test_a_tenant_cannot_use_another_tenants_vaccel_session(pair: Pair) -> None:
    created = pair.alice_vaccel.call(
        SERVICE, "CreateSession", vaccel.SessionCreateRequest(), vaccel.SessionCreateResponse
    )
    for method, request in (
        ("UpdateSession", vaccel.SessionUpdateRequest(session_id=created.session_id)),
        ("DestroySession", vaccel.SessionDestroyRequest(session_id=created.session_id)),
        ("ImageClassification", vaccel.ImageRequest(session_id=created.session_id, image=b"x")),
    ):
        with pytest.raises(NotFoundError, match=f"Unknown session {created.session_id}"):
            pair.bob_vaccel.call(SERVICE, method, request, vaccel.Empty)
    pair.alice_vaccel.call(
        SERVICE, "UpdateSession", vaccel.SessionUpdateRequest(session_id=created.session_id), vaccel.Empty
    )


def test_a_tenant_cannot_use_or_read_another_tenants_vaccel_resource(pair: Pair) -> None:
    sessions = [
        client.call(SERVICE, "CreateSession", vaccel.SessionCreateRequest(), vaccel.SessionCreateResponse).session_id
        for client in (pair.alice_vaccel, pair.bob_vaccel)
    ]
    blob = vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER, name="m", data=b"alice's bytes")
    registered = pair.alice_vaccel.call(
        SERVICE,
        "RegisterResource",
        vaccel.ResourceRegisterRequest(session_id=sessions[0], resource_type=1, blobs=[blob]),
        vaccel.ResourceRegisterResponse,
    )
    number = registered.resource_id
    for method, request in (
        ("RegisterResource", vaccel.ResourceRegisterRequest(session_id=sessions[1], resource_id=number)),
        ("UnregisterResource", vaccel.ResourceUnregisterRequest(session_id=sessions[1], resource_id=number)),
        ("SyncResource", vaccel.ResourceSyncRequest(resource_id=number)),
    ):
        with pytest.raises(NotFoundError, match=f"Unknown resource {number}"):
            pair.bob_vaccel.call(SERVICE, method, request, vaccel.Empty)
    synced = pair.alice_vaccel.call(
        SERVICE, "SyncResource", vaccel.ResourceSyncRequest(resource_id=number), vaccel.ResourceSyncResponse
    )
    assert bytes(synced.blobs[0].data) == b"alice's bytes"


def test_a_tenant_cannot_change_its_identity_by_what_it_says(pair: Pair) -> None:
    with Client(pair.agent.connect(pair.bob_socket)) as client:
        hello = client.call(
            remora_v1.SERVICE,
            "Hello",
            remora_v1.HelloRequest(version=1, client="sandbox:alice", token=pair.alice.token),
            remora_v1.HelloResponse,
            metadata={"tenant": "sandbox:alice", "sandbox": "alice"},
        )
    assert not hello.resumed


def test_a_tenant_cannot_reach_the_control_service_over_its_own_socket(pair: Pair) -> None:
    with Client(pair.agent.connect(pair.bob_socket)) as client, pytest.raises(RemoraError, match="no service"):
        client.call(control_v1.SERVICE, "Detach", control_v1.DetachRequest(sandbox="alice"), control_v1.Empty)
    pair.alice.ping()


def test_a_tenant_cannot_fill_anothers_quota(pair: Pair) -> None:
    request = remora_v1.PutResourceRequest(digest="sha256:" + "a" * 64, total_bytes=49_000_000, data=b"x")
    more = remora_v1.PutResourceRequest(digest="sha256:" + "b" * 64, total_bytes=49_000_000, data=b"x")
    pair.alice.call("PutResource", request, remora_v1.PutResourceResponse)
    with pytest.raises(ResourceExhaustedError):
        pair.alice.call("PutResource", more, remora_v1.PutResourceResponse)
    pair.bob.call("PutResource", request, remora_v1.PutResourceResponse)


def test_a_sandbox_that_is_gone_leaves_nothing_for_the_next_of_its_name(agent: AgentProcess) -> None:
    data = b"left behind" * 100
    path = agent.attach("carol")
    with Guest(agent.connect(path)) as guest:
        guest.upload(digest_of(data), data)
        token = guest.token
    agent.detach("carol")
    assert not path.exists()
    path = agent.attach("carol")
    with Guest(agent.connect(path), token) as guest:
        assert not guest.hello.resumed
        assert not guest.stat(digest_of(data)).complete
    agent.detach("carol")


def test_sandboxes_of_one_named_tenant_share_what_they_uploaded(agent: AgentProcess) -> None:
    data = b"shared by two sandboxes" * 10
    first, second = agent.attach("one", tenant="team"), agent.attach("two", tenant="team")
    with Guest(agent.connect(first)) as one, Guest(agent.connect(second), one.token) as two:
        one.upload(digest_of(data), data)
        assert two.stat(digest_of(data)).complete
        assert not two.hello.resumed  # sessions belong to the sandbox all the same
    agent.detach("one")
    agent.detach("two")
