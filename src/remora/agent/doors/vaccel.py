"""The vAccel door: `AgentService` under both of its names, for unchanged vAccel guests.

What differs from vAccel's own agent is on purpose (docs/vaccel.md): numbers are random and belong to an identity, a
guest's paths are never opened on the host, and a session that nobody uses ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remora.agent.answers import Answer
from remora.agent.bundles import Bundles
from remora.agent.core import Core
from remora.agent.doors.pictures import default_operation, text_of
from remora.agent.doors.vaccel_exec import ExecCalls
from remora.agent.doors.vaccel_genop import GenopCalls, text_into
from remora.agent.doors.vaccel_models import ModelCalls
from remora.agent.doors.vaccel_profiles import Profiles
from remora.agent.doors.vaccel_replies import DECODE_LIMITS, EMPTY, BareError, Replies, with_errno
from remora.agent.doors.vaccel_resources import ResourceCalls
from remora.agent.doors.vaccel_stream import GenopStreams
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import InternalError, InvalidArgumentError, RemoraError, ResourceExhaustedError, UnimplementedError
from remora.wire import vaccel
from remora.wire.protobuf import DecodeError
from remora.wire.ttrpc.calls import Call

_EUSERS = 87
_UNKNOWN = 2
#: Bytes of an ImageClassification answer; a shorter one crashes upstream's client.
_TAGS_BYTES = 1024


class VaccelDoor:
    """Answers the calls of vAccel's AgentService."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._replies = Replies(core)
        self._profiles = Profiles()
        bundles = Bundles(core.journal, core.store, core.sessions, core.limits)
        core.on_session_end.append(bundles.session_ended)
        core.on_session_end.append(lambda session: self._profiles.forget(session.id))
        core.on_tenant_gone.append(bundles.drop_tenant)
        core.sessions.on_fork = bundles.forked
        genop = GenopCalls(self._replies, self._profiles, ExecCalls(core, bundles))
        self._streams = GenopStreams(self._replies, genop)
        methods: dict[str, Callable[[Peer, Call, Any], None]] = {
            "CreateSession": self._create_session,
            "UpdateSession": self._update_session,
            "DestroySession": self._destroy_session,
            "ImageClassification": self._image_classification,
            "Genop": genop.genop,
            "GetProfiler": self._get_profiler,
            **ResourceCalls(self._replies, bundles).methods,
            **ModelCalls(self._replies, bundles).methods,
        }
        self._methods = {name: (vaccel.METHODS[name][0], method) for name, method in methods.items()}

    def handle(self, peer: Peer, call: Call) -> None:
        """Answer a call, now or later."""
        try:
            if call.method == "GenopStream":
                self._streams.begin(peer, call)
                return
            entry = self._methods.get(call.method)
            if entry is None:
                raise BareError(_unknown_method(call))
            entry[1](peer, call, entry[0].decode(call.payload, limits=DECODE_LIMITS))
        except DecodeError as error:
            self._replies.fail(peer, call, _undecodable(call, error))
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            self._replies.fail(peer, call, error)

    # -- sessions ---------------------------------------------------------------------------------------------------

    def _create_session(self, peer: Peer, call: Call, _request: vaccel.SessionCreateRequest) -> None:
        def created(outcome: Session | RemoraError) -> None:
            if isinstance(outcome, RemoraError):
                self._replies.fail(peer, call, outcome)
                return
            if not call.ended:
                self._core.use_session(peer, outcome)
            self._replies.respond(peer, call, vaccel.SessionCreateResponse(session_id=outcome.number))

        try:
            self._core.sessions.create_numbered(peer.identity, created)
        except ResourceExhaustedError as error:
            raise with_errno(error, _EUSERS) from None

    def _update_session(self, peer: Peer, call: Call, request: vaccel.SessionUpdateRequest) -> None:
        # Flags choose a plugin upstream; here the model's format and the scheduler do.
        self._replies.session(peer, request.session_id)
        self._replies.respond(peer, call, EMPTY)

    def _destroy_session(self, peer: Peer, call: Call, request: vaccel.SessionDestroyRequest) -> None:
        session = self._replies.session(peer, request.session_id)
        self._replies.respond(peer, call, EMPTY)
        self._core.sessions.end(session)

    def _get_profiler(self, peer: Peer, call: Call, request: vaccel.ProfilingRequest) -> None:
        profiler = None
        try:
            session = self._replies.session(peer, request.session_id)
        except BareError:
            pass  # upstream: an unknown session is answered, without a profiler
        else:
            profiler = self._profiles.profiler(session.id)
        self._replies.respond(peer, call, vaccel.ProfilingResponse(profiler=profiler))

    # -- pictures ---------------------------------------------------------------------------------------------------

    def _image_classification(self, peer: Peer, call: Call, request: vaccel.ImageRequest) -> None:
        session = self._replies.session(peer, request.session_id)
        deadline_s = self._core.deadline_s(call.deadline_s)
        operation = default_operation(self._core, session, "classify", request.image, deadline_s)

        def reply(answer: Answer) -> None:
            tags = text_into(text_of("classify", answer, _TAGS_BYTES), _TAGS_BYTES)
            self._replies.respond(peer, call, vaccel.ImageResponse(tags=tags), answer.drop)

        self._replies.run(peer, call, session, operation, reply)


def _unknown_method(call: Call) -> RemoraError:
    text = f"{call.service} has no method {call.method[:100]!r}"
    fix = f"it has {', '.join(vaccel.METHODS)}"
    if call.service == vaccel.ASYNC_SERVICE:
        return UnimplementedError(text, fix=fix)
    return InvalidArgumentError(text, fix=fix)


def _undecodable(call: Call, error: DecodeError) -> Exception:
    """Answer a payload that is no message: as upstream's asynchronous build; the other one closes the connection."""
    if call.service != vaccel.ASYNC_SERVICE:
        return error
    unknown = InternalError(error.message)
    unknown.code = _UNKNOWN
    return BareError(unknown)
