"""What both faces of the Open Inference Protocol share: sessions, models and inference in the agent's own terms.

The protocol has no sessions, so a caller gets one without asking: one per identity, opened by the first request that
needs one and shared by all its connections, because an HTTP client makes many and short ones. It ends when its lease
does. Uploads of the same tenant can be used by their digest; they are loaded into that session when first named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remora import __version__
from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.cards import ModelCard
from remora.agent.core import Core
from remora.agent.doors.calls import as_remora_error, run_for
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.agent.web.exchange import Exchange
from remora.errors import InvalidArgumentError, NotFoundError, RemoraError
from remora.workers.contract import TensorView

SERVER = "remora"
VERSION = __version__
#: What of Triton's extensions is here.
EXTENSIONS = ("binary_tensor_data", "model_repository")
#: Every model has one version.
MODEL_VERSION = "1"
_PLATFORMS = {"onnx": "onnx_onnxv1"}

Fail = Callable[[RemoraError], None]


@dataclass(frozen=True, slots=True)
class Inference:
    """A request for inference, read but not checked against anything."""

    model: str
    version: str
    inputs: Sequence[TensorView]
    outputs: Sequence[str]
    timeout_s: float | None


def platform(_card: ModelCard) -> str:
    return _PLATFORMS["onnx"]


def check_version(model: str, version: str) -> None:
    """
    Raises:
        NotFoundError: there is no such version.
    """
    if version not in ("", MODEL_VERSION):
        raise NotFoundError(
            f"there is no version {version[:40]!r} of model {model[:80]!r}", fix=f"the only version is {MODEL_VERSION}"
        )


def index_entry(card: ModelCard) -> dict[str, str]:
    """Return a model as the repository index shows it. All are usable; READY are those in memory already."""
    ready = card.spec is not None
    reason = "" if ready else "loaded by the first request"
    return {"name": card.name, "version": MODEL_VERSION, "state": "READY" if ready else "UNAVAILABLE", "reason": reason}


class Inferences:
    """Sessions, models and inference for callers of either face."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, list[Callable[[Session | RemoraError], None]]] = {}
        core.on_session_end.append(self._session_ended)

    # -- sessions ---------------------------------------------------------------------------------------------------

    def _with_session(self, peer: Peer, exchange: Exchange, use: Callable[[Session], None], fail: Fail) -> None:
        """Call `use` with the caller's session, now or once it is open; `fail` gets what goes wrong in it."""

        def opened(outcome: Session | RemoraError) -> None:
            if exchange.ended:
                return
            try:
                if isinstance(outcome, RemoraError):
                    raise outcome
                self._core.use_session(peer, outcome)
                use(outcome)
            except Exception as error:  # noqa: BLE001 - the border of a request: every failure is answered
                fail(as_remora_error(self._core, error))

        key = peer.identity.key
        session = self._sessions.get(key)
        if session is not None:
            opened(session)
        elif key in self._opening:
            self._opening[key].append(opened)
        else:
            waiting = self._opening[key] = [opened]
            try:
                self._core.sessions.create(peer.identity, lambda outcome: self._created(key, outcome))
            except RemoraError:
                del self._opening[key]
                waiting.clear()
                raise

    def _created(self, key: str, outcome: tuple[Session, bytes] | RemoraError) -> None:
        waiting = self._opening.pop(key, [])
        result: Session | RemoraError
        if isinstance(outcome, RemoraError):
            result = outcome
        elif outcome[0].ended:  # its sandbox was detached meanwhile
            result = NotFoundError("the caller's session has ended")
        else:
            result = self._sessions[key] = outcome[0]
        for opened in waiting:
            opened(result)

    def _session_ended(self, session: Session) -> None:
        if self._sessions.get(session.owner) is session:
            del self._sessions[session.owner]

    # -- the server -------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """True if a new request would be served."""
        return self._core.ready()[0]

    def index(
        self, peer: Peer, exchange: Exchange, ready_only: bool, done: Callable[[list[ModelCard]], None], fail: Fail
    ) -> None:
        """Hand the models that the caller may know of to `done`; `ready_only` leaves out those not in memory."""

        def use(session: Session) -> None:
            cards = self._core.models.cards(session)
            done([card for card in cards if card.spec is not None or not ready_only])

        self._with_session(peer, exchange, use, fail)

    # -- models -----------------------------------------------------------------------------------------------------

    def model(
        self, peer: Peer, exchange: Exchange, name: str, version: str, done: Callable[[ModelCard], None], fail: Fail
    ) -> None:
        """Load a model if need be; `done` gets it with what it takes and gives.

        Raises:
            RemoraError: there is no such model for this caller.
        """
        self._check_model(peer, name, version)

        def loaded(outcome: object) -> None:
            if exchange.ended:
                return
            try:
                if isinstance(outcome, RemoraError):
                    raise outcome
                done(self._core.models.card(peer.identity.tenant, name))
            except Exception as error:  # noqa: BLE001 - the border of a request: every failure is answered
                fail(as_remora_error(self._core, error))

        def use(session: Session) -> None:
            if operations.is_digest(name):
                self._core.models.load(session, name, "", loaded)
            else:
                self._core.models.ensure(session, name, loaded)

        self._with_session(peer, exchange, use, fail)

    def _check_model(self, peer: Peer, name: str, version: str) -> None:
        if not name:
            raise InvalidArgumentError("the request names no model")
        terms = self._core.quotas.terms(peer.identity.key, peer.identity.tenant)
        self._core.models.domain(peer.identity.tenant, operations.check_model(name), terms)
        check_version(name, version)

    # -- inference --------------------------------------------------------------------------------------------------

    def infer(
        self, peer: Peer, exchange: Exchange, asked: Inference, reply: Callable[[Answer], None], fail: Fail
    ) -> None:
        """Run an inference. Exactly one of `reply` and `fail` follows, unless the exchange is cancelled.

        Raises:
            RemoraError: it cannot start; neither follows.
        """
        self._check_model(peer, asked.model, asked.version)
        now_s = self._core.reactor.now_s()
        limits = [exchange.deadline_s, None if asked.timeout_s is None else now_s + asked.timeout_s]
        operation = operations.infer(
            asked.model,
            asked.inputs,
            asked.outputs,
            deadline_s=self._core.deadline_s(min((limit for limit in limits if limit is not None), default=None)),
        )
        self._core.metrics.received(peer.identity.tenant, operation.size_bytes)

        def run(session: Session) -> None:
            run_for(self._core, peer, exchange, session, operation, reply=reply, fail=fail)

        def use(session: Session) -> None:
            if not operations.is_digest(asked.model) or asked.model in (session.models or ()):
                run(session)
                return

            def loaded(outcome: ModelCard | RemoraError) -> None:
                if exchange.ended:
                    return
                try:
                    if isinstance(outcome, RemoraError):
                        raise outcome
                    run(session)
                except Exception as error:  # noqa: BLE001 - the border of a request: every failure is answered
                    fail(as_remora_error(self._core, error))

            self._core.models.load(session, asked.model, "", loaded)

        self._with_session(peer, exchange, use, fail)
