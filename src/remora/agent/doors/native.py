"""The native door: `remora.v1.Accelerator` (docs/protocol.md).

A connection says Hello once and is then in its session; no later request can name another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remora import __version__
from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.cards import ModelCard
from remora.agent.core import Core
from remora.agent.doors.calls import as_remora_error, run_for
from remora.agent.doors.inference import DECODE_LIMITS, form_of
from remora.agent.doors.pictures import RESPONSES
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import FailedPreconditionError, InvalidArgumentError, RemoraError, UnimplementedError
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.calls import Call
from remora.wire.ttrpc.reactor import ServerConnection
from remora.workers.contract import PICTURES

NAME = "native"
_EMPTY = v1.Empty()
_MAX_CLIENT_NAME = 200


def _same_data(payload: bytes | memoryview) -> list[bytes | memoryview] | None:
    """Return a NoopResponse with the data of a NoopRequest, both encoded; None if it needs the codec.

    The data has the same number in both, so what is sent back is what came, up to the request's id.
    """
    size = len(payload)
    if not size:
        return []
    if size < 2 or payload[0] != 0x0A or payload[1] > 127:
        return None
    end = 2 + payload[1]
    if end == size:
        return [payload]
    if end + 1 < size <= end + 11 and payload[end] == 0x10 and payload[size - 1] < 128:
        tail = payload[end + 1 : size - 1]
        if all(byte > 127 for byte in tail):  # one varint
            return [payload[:end]]
    return None


def _specs(specs: Any) -> list[v1.TensorSpec]:
    return [v1.TensorSpec(name=spec.name, dtype=spec.dtype, shape=list(spec.shape)) for spec in specs]


def model_info(card: ModelCard) -> v1.ModelInfo:
    """Return a model as the protocol shows it."""
    return v1.ModelInfo(
        name=card.name,
        task=card.task,
        inputs=_specs(card.inputs),
        outputs=_specs(card.outputs),
        digest=card.digest,
        description=card.description,
        licence=card.licence,
        size_bytes=card.size_bytes,
    )


class NativeDoor:
    """Answers the calls of `remora.v1.Accelerator`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        methods: dict[str, Callable[[Peer, Session, Call, Any], None]] = {
            "Close": self._close,
            "Models": self._models,
            "StatResource": self._stat_resource,
            "PutResource": self._put_resource,
            "LoadModel": self._load_model,
            "UnloadModel": self._unload_model,
            **{name.capitalize(): self._picture(name) for name in RESPONSES},
        }
        self._methods = {name: (v1.METHODS[name][0], method) for name, method in methods.items()}

    def handle(self, peer: Peer, call: Call) -> None:
        """Answer a call, now or later."""
        try:
            if call.method == "Noop":
                # By itself and first: it is what the path through the agent costs, and nothing else.
                session = peer.session
                if session is None or session.ended:
                    self._session(peer, call)
                answer = _same_data(call.payload)
                if answer is None:
                    request = v1.NoopRequest.decode(call.payload, limits=DECODE_LIMITS)
                    call.respond(v1.NoopResponse(data=request.data))
                else:
                    call.respond(answer)
                self._core.metrics.answered(NAME, "Noop", peer.identity.tenant, "OK")
                return
            if call.method == "Hello":
                self._hello(peer, call, v1.HelloRequest.decode(call.payload, limits=DECODE_LIMITS))
                return
            if call.method == "Share":
                self._share(peer, call, v1.ShareRequest.decode(call.payload, limits=DECODE_LIMITS))
                return
            if call.method == "Infer":
                self._infer(peer, self._session(peer, call), call)
                return
            entry = self._methods.get(call.method)
            if entry is None:
                raise UnimplementedError(
                    f"{v1.SERVICE} has no method {call.method[:100]!r}", fix=f"it has {', '.join(v1.METHODS)}"
                )
            session = self._session(peer, call)
            entry[1](peer, session, call, entry[0].decode(call.payload, limits=DECODE_LIMITS))
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            self._fail(peer, call, as_remora_error(self._core, error))

    def _session(self, peer: Peer, call: Call) -> Session:
        session = peer.session
        if session is None:
            raise FailedPreconditionError(f"{call.method} before Hello", fix="say Hello first on every connection")
        if session.ended:
            raise FailedPreconditionError("the session of this connection has ended", fix="connect again and say Hello")
        return session

    def _respond(self, peer: Peer, call: Call, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        self._core.metrics.answered(NAME, call.method, peer.identity.tenant, "OK")
        call.respond(message, on_sent=on_sent)

    def _fail(self, peer: Peer, call: Call, error: RemoraError, model: str = "") -> None:
        if call.fail(error):
            method = call.method if call.method in v1.METHODS else "unknown"
            self._core.refused(NAME, method, peer, error, model=model)

    # -- the session ------------------------------------------------------------------------------------------------

    def _hello(self, peer: Peer, call: Call, request: v1.HelloRequest) -> None:
        if peer.session is not None or peer.greeting:
            raise FailedPreconditionError("this connection has a session already", fix="say Hello once per connection")
        if not 1 <= request.version <= v1.VERSION:
            raise InvalidArgumentError(
                f"the client asks for version {request.version} of {v1.SERVICE}",
                fix=f"this agent speaks version {v1.VERSION}",
            )
        sessions, identity, token = self._core.sessions, peer.identity, request.token
        if sessions.closed is not None:
            raise sessions.closed()
        client = request.client[:_MAX_CLIENT_NAME]
        if token:
            session = sessions.resume(identity, token)
            if session is not None:
                self._welcome(peer, call, client, session, bytes(token), resumed=True)
                return
            if sessions.fork(identity, token, lambda outcome: self._opened(peer, call, client, outcome, forked=True)):
                peer.greeting = True
                return
        sessions.create(identity, lambda outcome: self._opened(peer, call, client, outcome))
        peer.greeting = True

    def _opened(
        self,
        peer: Peer,
        call: Call,
        client: str,
        outcome: tuple[Session, bytes] | RemoraError,
        *,
        forked: bool = False,
    ) -> None:
        peer.greeting = False
        if isinstance(outcome, RemoraError):
            self._fail(peer, call, outcome)
        else:
            self._welcome(peer, call, client, *outcome, forked=forked)

    def _welcome(
        self,
        peer: Peer,
        call: Call,
        client: str,
        session: Session,
        token: bytes,
        *,
        resumed: bool = False,
        forked: bool = False,
    ) -> None:
        if call.ended:
            return
        self._core.open_session(peer, session)
        how = "resumed" if resumed else "forked" if forked else "opened"
        self._core.log.of_tenant(
            peer.identity.tenant,
            f"session {how}",
            level="info",
            session=session.id,
            sandbox=peer.identity.sandbox,
            client=client,
        )
        limits = self._core.limits
        terms = self._core.quotas.terms(session.owner, session.tenant)
        response = v1.HelloResponse(
            session_id=session.id,
            token=token,
            resumed=resumed,
            forked=forked,
            lease_s=limits.lease_s,
            max_message_bytes=self._core.message_bytes(peer.identity),
            operations=[name for name in operations.NAMES if terms.allows("operations", name)],
            agent=f"remora {__version__}",
            version=v1.VERSION,
            share_bytes=self._core.sharing.offered_bytes(peer),
        )
        self._respond(peer, call, response)

    def _share(self, peer: Peer, call: Call, request: v1.ShareRequest) -> None:
        """Answer with a descriptor, on a connection that carries nothing else: no other read can lose it."""
        session = self._core.sessions.resume(peer.identity, request.token)
        user = session.peer if session is not None else None
        if not isinstance(user, Peer) or not isinstance(peer.connection, ServerConnection) or not peer.local:
            raise FailedPreconditionError(
                "Share with a token of no session that has a connection", fix="open a connection with Hello first"
            )
        number, region = self._core.sharing.share(user, request.size_bytes)
        peer.connection.pass_fd(region.fd)
        self._respond(peer, call, v1.ShareResponse(region=number, size_bytes=region.size))

    def _close(self, peer: Peer, session: Session, call: Call, _request: v1.Empty) -> None:
        self._respond(peer, call, _EMPTY)
        self._core.sessions.end(session)

    # -- resources and models ---------------------------------------------------------------------------------------

    def _models(self, peer: Peer, session: Session, call: Call, _request: v1.Empty) -> None:
        cards = self._core.models.cards(session)
        self._respond(peer, call, v1.ModelsResponse(models=[model_info(card) for card in cards]))

    def _stat_resource(self, peer: Peer, session: Session, call: Call, request: v1.StatResourceRequest) -> None:
        digest = operations.check_digest(request.digest)

        def stated(answer: tuple[bool, int]) -> None:
            complete, received = answer
            if complete and not session.ended:
                self._core.sessions.hold(session, digest)
            self._respond(peer, call, v1.StatResourceResponse(complete=complete, received_bytes=received))

        self._core.store.stat_settled(session.tenant, digest, stated)

    def _put_resource(self, peer: Peer, session: Session, call: Call, request: v1.PutResourceRequest) -> None:
        digest = operations.check_digest(request.digest)

        def stored(outcome: tuple[int, bool] | RemoraError) -> None:
            call.release()
            if isinstance(outcome, RemoraError):
                self._fail(peer, call, outcome, digest)
                return
            received, complete = outcome
            if complete and not session.ended:
                self._core.sessions.hold(session, digest)
            self._respond(peer, call, v1.PutResourceResponse(received_bytes=received, complete=complete))

        call.retain()
        try:
            self._core.store.put(session.tenant, digest, request.offset, request.total_bytes, request.data, stored)
        except RemoraError:
            call.release()
            raise

    def _load_model(self, peer: Peer, session: Session, call: Call, request: v1.LoadModelRequest) -> None:
        model = operations.check_model(request.model)

        def loaded(outcome: ModelCard | RemoraError) -> None:
            if isinstance(outcome, RemoraError):
                self._fail(peer, call, outcome, model)
            else:
                self._respond(peer, call, v1.LoadModelResponse(model=model_info(outcome)))

        self._core.models.load(session, model, request.format, loaded)

    def _unload_model(self, peer: Peer, session: Session, call: Call, request: v1.UnloadModelRequest) -> None:
        self._core.models.unload(session, operations.check_model(request.model))
        self._respond(peer, call, _EMPTY)

    # -- operations -------------------------------------------------------------------------------------------------

    def _infer(self, peer: Peer, session: Session, call: Call) -> None:
        form, request_id = form_of(peer, call.payload)
        operation = form.ask(self._core.deadline_s(call.deadline_s), request_id)

        def reply(answer: Answer) -> None:
            call.respond(form.answer(answer), on_sent=answer.drop)
            self._core.metrics.answered(NAME, "Infer", peer.identity.tenant, "OK")

        self._run(peer, session, call, operation, reply)

    def _picture(self, name: str) -> Callable[[Peer, Session, Call, Any], None]:
        """Return the method for an operation on pictures."""

        def method(peer: Peer, session: Session, call: Call, request: v1.PictureRequest | v1.ClassifyRequest) -> None:
            operation = operations.picture(
                name,
                request.model or self._core.models.default_for(session, PICTURES[name]),
                request.image,
                request.top,
                deadline_s=self._core.deadline_s(call.deadline_s),
                request_id=request.request_id,
            )

            def reply(answer: Answer) -> None:
                self._respond(peer, call, RESPONSES[name](answer), answer.drop)

            self._run(peer, session, call, operation, reply)

        return method

    def _run(
        self,
        peer: Peer,
        session: Session,
        call: Call,
        operation: operations.Operation,
        reply: Callable[[Answer], None],
    ) -> None:
        self._core.metrics.received(peer.identity.tenant, operation.size_bytes)
        run_for(
            self._core,
            peer,
            call,
            session,
            operation,
            reply=reply,
            fail=lambda error: self._fail(peer, call, error, operation.model),
        )
