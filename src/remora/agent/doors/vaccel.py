"""The vAccel door: `AgentService` under both of its names, for unchanged vAccel guests.

What differs from vAccel's own agent is on purpose: numbers are random and belong to an identity, a guest's paths are
never opened on the host, and a session that nobody uses ends. Errors carry the errno that vAccel's clients hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.bundles import Bundles
from remora.agent.core import Core
from remora.agent.doors.calls import as_remora_error, run_for
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import (
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
    ResourceExhaustedError,
    UnimplementedError,
)
from remora.wire import vaccel
from remora.wire.protobuf import Limits, Message
from remora.wire.ttrpc.calls import Call

NAME = "vaccel"
_DECODE_LIMITS = Limits(max_depth=4, max_elements=4096)
_EMPTY = vaccel.Empty()
_MAX_BLOBS = 64
_MAX_NAME = 255
_EUSERS = 87
#: Bytes of an ImageClassification answer; a shorter one crashes upstream's client.
_TAGS_BYTES = 1024


def with_errno(error: RemoraError, number: int | None = None) -> RemoraError:
    """Let the error carry an errno (its own, unless given), as vAccel's clients expect it."""
    error.details = vaccel.error_details(ffi_error=number or error.errno)
    return error


def bad_value(text: str, kind: int = vaccel.ErrorType.CONVERSION_FAILED) -> RemoraError:
    """Return the error by which vAccel's agent answers a value that cannot be."""
    error = InternalError(text)
    error.details = vaccel.error_details(error_type=kind, status=vaccel.Status(message=text))
    return error


def tags_of(names: list[str]) -> bytes:
    """Return the text of labels as vAccel's clients expect it: NUL-padded, and never filled to the last byte."""
    text = ", ".join(names).encode()[: _TAGS_BYTES - 1]
    text = text.decode(errors="ignore").encode()  # no half character at the cut
    return text.ljust(_TAGS_BYTES, b"\0")


class VaccelDoor:
    """Answers the calls of vAccel's AgentService."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._bundles = Bundles(core.journal, core.store, core.sessions, core.limits)
        core.on_session_end.append(self._bundles.session_ended)
        core.on_tenant_gone.append(self._bundles.drop_tenant)
        core.sessions.on_fork = self._bundles.forked
        methods: dict[str, Callable[[Peer, Call, Any], None]] = {
            "CreateSession": self._create_session,
            "UpdateSession": self._update_session,
            "DestroySession": self._destroy_session,
            "RegisterResource": self._register_resource,
            "UnregisterResource": self._unregister_resource,
            "SyncResource": self._sync_resource,
            "ImageClassification": self._image_classification,
        }
        self._methods = {name: (vaccel.METHODS[name][0], method) for name, method in methods.items()}

    def handle(self, peer: Peer, call: Call) -> None:
        """Answer a call, now or later."""
        try:
            entry = self._methods.get(call.method)
            if entry is None:
                raise with_errno(UnimplementedError(f"the agent does not offer {call.service}/{call.method[:100]} yet"))
            entry[1](peer, call, entry[0].decode(call.payload, limits=_DECODE_LIMITS))
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            self._fail(peer, call, as_remora_error(self._core, error))

    def _respond(self, peer: Peer, call: Call, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        self._core.metrics.answered(NAME, call.method, peer.identity.tenant, "OK")
        call.respond(message, on_sent=on_sent)

    def _fail(self, peer: Peer, call: Call, error: RemoraError) -> None:
        if not error.details and not isinstance(error, NotFoundError):
            error = with_errno(error)
        if call.fail(error):
            known = call.method in vaccel.METHODS
            self._core.refused(NAME, call.method if known else "unknown", peer, error)

    def _session(self, peer: Peer, number: int) -> Session:
        if number <= 0:
            raise bad_value(f"Invalid session id {number}", vaccel.ErrorType.INVALID_ARGUMENT)
        session = self._core.sessions.numbered(peer.identity, number)
        self._core.use_session(peer, session)
        return session

    # -- sessions ---------------------------------------------------------------------------------------------------

    def _create_session(self, peer: Peer, call: Call, _request: vaccel.SessionCreateRequest) -> None:
        def created(outcome: Session | RemoraError) -> None:
            if isinstance(outcome, RemoraError):
                self._fail(peer, call, outcome)
                return
            if not call.ended:
                self._core.use_session(peer, outcome)
            self._respond(peer, call, vaccel.SessionCreateResponse(session_id=outcome.number))

        try:
            self._core.sessions.create_numbered(peer.identity, created)
        except ResourceExhaustedError as error:
            raise with_errno(error, _EUSERS) from None

    def _update_session(self, peer: Peer, call: Call, request: vaccel.SessionUpdateRequest) -> None:
        self._session(peer, request.session_id)  # flags choose a plugin upstream; here the scheduler chooses
        self._respond(peer, call, _EMPTY)

    def _destroy_session(self, peer: Peer, call: Call, request: vaccel.SessionDestroyRequest) -> None:
        session = self._session(peer, request.session_id)
        self._respond(peer, call, _EMPTY)
        self._core.sessions.end(session)

    # -- resources --------------------------------------------------------------------------------------------------

    def _register_resource(self, peer: Peer, call: Call, request: vaccel.ResourceRegisterRequest) -> None:
        session = self._session(peer, request.session_id)
        if request.resource_id < 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        if request.resource_id:
            bundle = self._bundles.find(session.tenant, request.resource_id)
            self._bundles.register(session, bundle)
            self._acknowledge(peer, call, bundle.id)
            return
        self._check_blobs(request)
        digests: list[str] = []
        call.retain()

        def next_blob(outcome: str | RemoraError | None) -> None:
            if isinstance(outcome, str):
                digests.append(outcome)
                if not session.ended:
                    self._core.sessions.hold(session, outcome)
            if not isinstance(outcome, RemoraError) and len(digests) < len(request.blobs):
                try:
                    self._core.store.add(session.tenant, request.blobs[len(digests)].data, next_blob)
                except RemoraError as error:
                    outcome = error
                else:
                    return
            call.release()
            if isinstance(outcome, RemoraError):
                self._fail(peer, call, outcome)
            elif session.ended:
                self._fail(peer, call, NotFoundError(f"Unknown session {session.number}"))
            else:
                self._registered(peer, call, session, request.resource_type, tuple(digests))

        next_blob(None)

    def _registered(self, peer: Peer, call: Call, session: Session, kind: int, digests: tuple[str, ...]) -> None:
        try:
            bundle = self._bundles.create(session, kind, digests)
        except RemoraError as error:
            self._fail(peer, call, error)
            return
        self._acknowledge(peer, call, bundle.id)

    def _acknowledge(self, peer: Peer, call: Call, number: int) -> None:
        """Answer a registration once a crash cannot lose it."""

        def settled(error: RemoraError | None) -> None:
            if error is not None:
                self._fail(peer, call, error)
            else:
                self._respond(peer, call, vaccel.ResourceRegisterResponse(resource_id=number))

        self._core.sessions.settle(settled)

    @staticmethod
    def _check_blobs(request: vaccel.ResourceRegisterRequest) -> None:
        if request.paths:
            raise with_errno(
                PermissionDeniedError(
                    "RegisterResource names paths, and the agent opens no path of its host for a guest",
                    fix="send the files as blobs",
                )
            )
        if not request.blobs:
            raise InvalidArgumentError("No paths or blobs provided")
        if not vaccel.ResourceType.LIB <= request.resource_type <= vaccel.ResourceType.MODEL:
            raise bad_value(f"Invalid resource type {request.resource_type}")
        if len(request.blobs) > _MAX_BLOBS:
            raise InvalidArgumentError(f"{len(request.blobs)} blobs were sent, at most {_MAX_BLOBS} are allowed")
        for blob in request.blobs:
            if not vaccel.BlobType.FILE <= blob.type_ <= vaccel.BlobType.MAPPED:
                raise bad_value(f"Invalid blob type {blob.type_}")
            if blob.type_ == vaccel.BlobType.FILE:
                raise InvalidArgumentError("a blob of type FILE has no bytes", fix="send type BUFFER or MAPPED")
            if not len(blob.data):
                raise InvalidArgumentError("a blob is empty", fix="send its bytes as data")
            if len(blob.name) > _MAX_NAME:
                raise InvalidArgumentError(f"a blob's name is longer than {_MAX_NAME} characters")

    def _unregister_resource(self, peer: Peer, call: Call, request: vaccel.ResourceUnregisterRequest) -> None:
        session = self._session(peer, request.session_id)
        if request.resource_id <= 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        self._bundles.unregister(session, self._bundles.find(session.tenant, request.resource_id))
        self._respond(peer, call, _EMPTY)

    def _sync_resource(self, peer: Peer, call: Call, request: vaccel.ResourceSyncRequest) -> None:
        if request.resource_id <= 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        tenant = peer.identity.tenant
        bundle = self._bundles.find(tenant, request.resource_id)
        total = sum(self._core.store.size(tenant, digest) for digest in bundle.digests)
        if total > self._core.limits.message_bytes:
            raise ResourceExhaustedError(
                f"the resource's {total} bytes exceed one message of {self._core.limits.message_bytes} bytes "
                "(limits.message_bytes)",
                fix="ask the operator to raise it",
            )
        blobs: list[vaccel.ResourceBlob] = []

        def read(path: Path) -> None:
            self._core.disk.submit(bundle.digests[len(blobs)], path.read_bytes, append)

        def append(data: bytes | RemoraError) -> None:
            if isinstance(data, RemoraError):
                self._fail(peer, call, data)
                return
            blobs.append(vaccel.ResourceBlob(data=data, size=len(data)))
            next_blob()

        def opened(path: Path | RemoraError) -> None:
            try:
                if isinstance(path, RemoraError):
                    raise path
                read(path)
            except RemoraError as error:
                self._fail(peer, call, error)

        def next_blob() -> None:
            if len(blobs) == len(bundle.digests):
                self._respond(peer, call, vaccel.ResourceSyncResponse(blobs=blobs))
                return
            try:
                self._core.store.open(tenant, bundle.digests[len(blobs)], opened)
            except RemoraError as error:
                self._fail(peer, call, error)

        next_blob()

    # -- operations -------------------------------------------------------------------------------------------------

    def _image_classification(self, peer: Peer, call: Call, request: vaccel.ImageRequest) -> None:
        session = self._session(peer, request.session_id)
        operation = operations.classify(
            self._core.models.default_classifier(), request.image, 1, deadline_s=self._core.deadline_s(call.deadline_s)
        )

        def reply(answer: Answer) -> None:
            tags = tags_of([label.name for label in answer.result.labels])
            self._respond(peer, call, vaccel.ImageResponse(tags=tags), answer.drop)

        self._core.metrics.received(peer.identity.tenant, operation.size_bytes)
        run_for(
            self._core, peer, call, session, operation, reply=reply, fail=lambda error: self._fail(peer, call, error)
        )
