"""vAccel's resources: blobs under one number, registered with sessions.

A blob's name is a label and never a path; its bytes lie in the store under their digest. Paths that a guest names are
refused: upstream's agent opens them, and downloads URLs, on its own host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remora.agent.bundles import Bundle, Bundles
from remora.agent.doors.vaccel_replies import EMPTY, BareError, Replies, bad_value, with_errno
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.wire import vaccel
from remora.wire.ttrpc.calls import Call

_MAX_BLOBS = 64
_MAX_NAME = 255


class ResourceCalls:
    """Answers the three methods."""

    def __init__(self, replies: Replies, bundles: Bundles) -> None:
        self._replies = replies
        self._core = replies.core
        self._bundles = bundles
        self.methods: Mapping[str, Callable[[Peer, Call, Any], None]] = {
            "RegisterResource": self._register_resource,
            "UnregisterResource": self._unregister_resource,
            "SyncResource": self._sync_resource,
        }

    def _find(self, tenant: str, number: int) -> Bundle:
        try:
            return self._bundles.find(tenant, number)
        except NotFoundError as error:
            raise BareError(error) from error

    def _register_resource(self, peer: Peer, call: Call, request: vaccel.ResourceRegisterRequest) -> None:
        session = self._replies.session(peer, request.session_id)
        if request.resource_id < 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        if request.resource_id:
            bundle = self._find(session.tenant, request.resource_id)
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
                self._replies.fail(peer, call, outcome)
            elif session.ended:
                self._replies.fail(peer, call, BareError(NotFoundError(f"Unknown session {session.number}")))
            else:
                self._registered(peer, call, session, request.resource_type, tuple(digests))

        next_blob(None)

    def _registered(self, peer: Peer, call: Call, session: Session, kind: int, digests: tuple[str, ...]) -> None:
        try:
            bundle = self._bundles.create(session, kind, digests)
        except RemoraError as error:
            self._replies.fail(peer, call, error)
            return
        self._acknowledge(peer, call, bundle.id)

    def _acknowledge(self, peer: Peer, call: Call, number: int) -> None:
        """Answer a registration once a crash cannot lose it."""

        def settled(error: RemoraError | None) -> None:
            if error is not None:
                self._replies.fail(peer, call, error)
            else:
                self._replies.respond(peer, call, vaccel.ResourceRegisterResponse(resource_id=number))

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
            raise BareError(InvalidArgumentError("No paths or blobs provided"))
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
        session = self._replies.session(peer, request.session_id)
        if request.resource_id <= 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        self._bundles.unregister(session, self._find(session.tenant, request.resource_id))
        self._replies.respond(peer, call, EMPTY)

    def _sync_resource(self, peer: Peer, call: Call, request: vaccel.ResourceSyncRequest) -> None:
        if request.resource_id <= 0:
            raise bad_value(f"Invalid resource id {request.resource_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        tenant = peer.identity.tenant
        bundle = self._find(tenant, request.resource_id)
        total = sum(self._core.store.size(tenant, digest) for digest in bundle.digests)
        most, name = self._core.message_limit(peer.identity)
        if total > most:
            raise ResourceExhaustedError(
                f"the resource's {total} bytes exceed one message of {most} bytes ({name})",
                fix="ask the operator to raise it",
            )
        blobs: list[vaccel.ResourceBlob] = []

        def read(path: Path) -> None:
            self._core.disk.submit(bundle.digests[len(blobs)], path.read_bytes, append)

        def append(data: bytes | RemoraError) -> None:
            if isinstance(data, RemoraError):
                self._replies.fail(peer, call, data)
                return
            blobs.append(vaccel.ResourceBlob(data=data, size=len(data)))
            next_blob()

        def opened(path: Path | RemoraError) -> None:
            try:
                if isinstance(path, RemoraError):
                    raise path
                read(path)
            except RemoraError as error:
                self._replies.fail(peer, call, error)

        def next_blob() -> None:
            if len(blobs) == len(bundle.digests):
                self._replies.respond(peer, call, vaccel.ResourceSyncResponse(blobs=blobs))
                return
            try:
                self._core.store.open(tenant, bundle.digests[len(blobs)], opened)
            except RemoraError as error:
                self._replies.fail(peer, call, error)

        next_blob()
