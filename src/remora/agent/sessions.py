"""Sessions: what a caller holds, and the secret by which it comes back to it.

A session belongs to one identity. Its token is random, kept only as a SHA-256 hash, and worth nothing to anyone else:
a token that is unknown and one that belongs to somebody else are answered alike, with a fresh session. Only a clone of
a template may present its template's token, and gets a copy.

A session without a connection lives on for its lease; one of a template until the template is detached.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from remora.agent.identity import Identity
from remora.agent.journal import Journal
from remora.agent.policy import Limits
from remora.agent.quotas import Quotas
from remora.agent.store import Store
from remora.errors import NotFoundError, RemoraError, ResourceExhaustedError

_ID_BYTES = 16
_TOKEN_BYTES = 32
_NUMBER_BITS = 63


class Session:
    """One session. Small on purpose: ten thousand of them wait on a node."""

    __slots__ = (
        "connections",
        "ended",
        "holds",
        "id",
        "models",
        "number",
        "owner",
        "peer",
        "template",
        "tenant",
        "token_hash",
    )

    def __init__(
        self, session_id: str, owner: str, tenant: str, *, token_hash: bytes | None, number: int, template: bool
    ) -> None:
        self.id = session_id
        #: Key of the identity it belongs to.
        self.owner = owner
        self.tenant = tenant
        self.token_hash = token_hash
        #: vAccel's name of it; 0 for a native session.
        self.number = number
        self.template = template
        self.connections = 0
        self.ended = False
        #: The connection of a native session (a `peers.Peer`); a new one takes its place.
        self.peer: object | None = None
        #: Digests it keeps from eviction.
        self.holds: set[str] | None = None
        #: Models it loaded, with their format.
        self.models: dict[str, str] | None = None


def hash_token(token: bytes | memoryview) -> bytes:
    return hashlib.sha256(token).digest()


def random_number() -> int:
    """Return an unguessable positive number, as vAccel's ids must be."""
    return secrets.randbits(_NUMBER_BITS) or 1


class Sessions:
    """All sessions of the node."""

    def __init__(
        self,
        journal: Journal,
        store: Store,
        limits: Limits,
        now_s: Callable[[], float],
        on_end: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self._journal = journal
        self._store = store
        self._limits = limits
        self._now_s = now_s
        #: Called once for each session that ends, before what it holds is released.
        self.on_end = on_end
        #: Called with a template's session and its copy.
        self.on_fork: Callable[[Session, Session], None] = lambda _original, _copy: None
        self.quotas: Quotas | None = None
        #: Raised instead of opening a session, while the agent drains.
        self.closed: Callable[[], RemoraError] | None = None
        self._by_id: dict[str, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._by_number: dict[tuple[str, int], Session] = {}
        self._leases: OrderedDict[str, float] = OrderedDict()
        self.per_tenant: Counter[str] = Counter()
        #: (tenant, model) -> sessions that loaded it.
        self.model_users: Counter[tuple[str, str]] = Counter()
        self._recover()

    def _recover(self) -> None:
        for sid, token_hash, number, owner, tenant, template in self._journal.rows(
            "SELECT id, token_hash, number, owner, tenant, template FROM sessions"
        ):
            self._admit(Session(sid, owner, tenant, token_hash=token_hash, number=number, template=bool(template)))
        for sid, digest in self._journal.rows("SELECT session, digest FROM session_holds"):
            if (session := self._by_id.get(sid)) is not None and self._store.owns(session.tenant, digest):
                self._note_hold(session, digest)
        for sid, model, model_format in self._journal.rows("SELECT session, model, format FROM session_models"):
            if (session := self._by_id.get(sid)) is not None:
                session.models = (session.models or {}) | {model: model_format}
                self.model_users[session.tenant, model] += 1

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_id.values())

    def of_owner(self, owner: str) -> list[Session]:
        return [session for session in self._by_id.values() if session.owner == owner]

    # -- opening ----------------------------------------------------------------------------------------------------

    def resume(self, identity: Identity, token: bytes | memoryview) -> Session | None:
        """Return the session of a token, if it is this identity's own."""
        session = self._of_token(token)
        if session is None or session.owner != identity.key:
            return None
        return session

    def fork(
        self, identity: Identity, token: bytes | memoryview, done: Callable[[tuple[Session, bytes] | RemoraError], None]
    ) -> bool:
        """Copy the session of a token for a clone of the template it belongs to. False: nothing of the kind."""
        session = self._of_token(token)
        if session is None or not self._is_template_of(session, identity):
            return False
        self.create(identity, done, copy_of=session)
        return True

    def create(
        self,
        identity: Identity,
        done: Callable[[tuple[Session, bytes] | RemoraError], None],
        *,
        copy_of: Session | None = None,
    ) -> None:
        """Open a session; `done` gets it with its token once a crash cannot lose it.

        Raises:
            ResourceExhaustedError: the tenant has too many.
        """
        token = secrets.token_bytes(_TOKEN_BYTES)
        session = self._new(identity, token_hash=hash_token(token), number=0)
        self._store_new(session, copy_of, lambda error: done((session, token) if error is None else error))

    def create_numbered(
        self, identity: Identity, done: Callable[[Session | RemoraError], None], *, copy_of: Session | None = None
    ) -> Session:
        """Open a session that is known by a number (vAccel)."""
        number = copy_of.number if copy_of is not None else random_number()
        session = self._new(identity, token_hash=None, number=number)
        self._store_new(session, copy_of, lambda error: done(session if error is None else error))
        self._start_lease(session)
        return session

    def numbered(self, identity: Identity, number: int) -> Session:
        """Return the identity's session of that number; a clone's first use of its template's number copies it.

        Raises:
            NotFoundError: there is none, or it is somebody else's.
        """
        session = self._by_number.get((identity.key, number))
        if session is None and identity.parent:
            original = self._by_number.get((f"sandbox:{identity.parent}", number))
            if original is not None and self._is_template_of(original, identity):
                session = self.create_numbered(identity, lambda _outcome: None, copy_of=original)
        if session is None:
            raise NotFoundError(f"Unknown session {number}")  # vAccel's own words
        self._start_lease(session)
        return session

    def _of_token(self, token: bytes | memoryview) -> Session | None:
        hashed = hash_token(token)
        session = self._by_token.get(hashed)
        if session is None or not hmac.compare_digest(session.token_hash or b"", hashed):
            return None
        return session

    @staticmethod
    def _is_template_of(session: Session, identity: Identity) -> bool:
        return session.template and bool(identity.parent) and session.owner == f"sandbox:{identity.parent}"

    def _new(self, identity: Identity, *, token_hash: bytes | None, number: int) -> Session:
        if self.closed is not None:
            raise self.closed()
        terms = self.quotas.terms(identity.key, identity.tenant) if self.quotas is not None else None
        granted: int | None = terms.values["sessions"] if terms is not None else None
        most = granted or self._limits.sessions_per_tenant
        if self.per_tenant[identity.tenant] >= most and not self._end_oldest(identity):
            if terms is not None and granted is not None:
                raise terms.exhausted("sessions", f"this tenant has {most} sessions", self._limits.lease_s)
            raise ResourceExhaustedError(
                f"this tenant has {self._limits.sessions_per_tenant} sessions (limits.sessions_per_tenant)",
                fix="close sessions that are not needed, or ask the operator to raise it",
            )
        session = Session(
            secrets.token_hex(_ID_BYTES),
            identity.key,
            identity.tenant,
            token_hash=token_hash,
            number=number,
            template=identity.template,
        )
        self._admit(session)
        return session

    def _end_oldest(self, identity: Identity) -> bool:
        """End the identity's session that has been without a connection longest; False if all are connected.

        A client that crashes in a loop and never presents a token would lock itself out for the lease otherwise.
        """
        for session_id in self._leases:
            session = self._by_id[session_id]
            if session.owner == identity.key:
                self.end(session)
                return True
        return False

    def _admit(self, session: Session) -> None:
        self._by_id[session.id] = session
        if session.token_hash is not None:
            self._by_token[session.token_hash] = session
        if session.number:
            self._by_number[session.owner, session.number] = session
        self.per_tenant[session.tenant] += 1
        self._start_lease(session)

    def _store_new(self, session: Session, copy_of: Session | None, done: Callable[[RemoraError | None], None]) -> None:
        statements: list[tuple[str, Sequence[Any]]] = [
            (
                "INSERT INTO sessions VALUES (?,?,?,?,?,?)",
                (
                    session.id,
                    session.token_hash,
                    session.number,
                    session.owner,
                    session.tenant,
                    int(session.template),
                ),
            )
        ]
        if copy_of is not None:
            self._store.grant(session.tenant, copy_of.holds or ())
            for digest in copy_of.holds or ():
                self._note_hold(session, digest)
                statements.append(("INSERT INTO session_holds VALUES (?,?)", (session.id, digest)))
            session.models = dict(copy_of.models) if copy_of.models else None
            for model, model_format in (session.models or {}).items():
                self.model_users[session.tenant, model] += 1
                statements.append(("INSERT INTO session_models VALUES (?,?,?)", (session.id, model, model_format)))
            self.on_fork(copy_of, session)

        def written(error: RemoraError | None) -> None:
            if error is not None:
                self.end(session)
            done(error)

        self._journal.write(*statements, done=written)

    # -- what a session holds ---------------------------------------------------------------------------------------

    def hold(self, session: Session, digest: str) -> None:
        """Keep a resource from eviction while the session lives."""
        if digest not in (session.holds or ()):
            self._note_hold(session, digest)
            self._journal.write(("INSERT OR IGNORE INTO session_holds VALUES (?,?)", (session.id, digest)))

    def unhold(self, session: Session, digest: str) -> None:
        if session.holds is not None and digest in session.holds:
            session.holds.discard(digest)
            self._store.unhold(session.tenant, digest)
            self._journal.write(("DELETE FROM session_holds WHERE session=? AND digest=?", (session.id, digest)))

    def _note_hold(self, session: Session, digest: str) -> None:
        if session.holds is None:
            session.holds = set()
        session.holds.add(digest)
        self._store.hold(session.tenant, digest)

    def add_model(self, session: Session, model: str, model_format: str) -> None:
        """Remember that the session loaded a model.

        Raises:
            ResourceExhaustedError: it has too many.
        """
        models = session.models if session.models is not None else {}
        if model not in models and len(models) >= self._limits.models_per_session:
            raise ResourceExhaustedError(
                f"this session has {len(models)} models loaded (limits.models_per_session)",
                fix="unload one, or ask the operator to raise it",
            )
        if model not in models:
            self.model_users[session.tenant, model] += 1
        if models.get(model) != model_format:
            models[model] = model_format
            session.models = models
            self._journal.write(
                ("INSERT OR REPLACE INTO session_models VALUES (?,?,?)", (session.id, model, model_format))
            )

    def settle(self, done: Callable[[RemoraError | None], None]) -> None:
        """Call `done` once everything noted so far survives a crash of the agent."""
        self._journal.write(done=done)

    def remove_model(self, session: Session, model: str) -> bool:
        """Forget a loaded model; False if the session had not loaded it."""
        if session.models is None or session.models.pop(model, None) is None:
            return False
        self._forget_user(session.tenant, model)
        self._journal.write(("DELETE FROM session_models WHERE session=? AND model=?", (session.id, model)))
        return True

    def uses_model(self, tenant: str, model: str) -> bool:
        """True if some session of the tenant has loaded the model."""
        return (tenant, model) in self.model_users

    def _forget_user(self, tenant: str, model: str) -> None:
        self.model_users[tenant, model] -= 1
        if not self.model_users[tenant, model]:
            del self.model_users[tenant, model]

    # -- living and ending ------------------------------------------------------------------------------------------

    def connected(self, session: Session) -> None:
        session.connections += 1
        self._leases.pop(session.id, None)

    def disconnected(self, session: Session) -> None:
        session.connections -= 1
        if not session.ended:
            self._start_lease(session)

    def _start_lease(self, session: Session) -> None:
        if not session.connections and not session.template:
            self._leases[session.id] = self._now_s() + self._limits.lease_s
            self._leases.move_to_end(session.id)

    def lease_s(self, session: Session) -> float:
        """Return how long the session lives without a connection; 0 while it has one, or if it has no end."""
        return max(0.0, self._leases.get(session.id, 0.0) - self._now_s())

    def expire(self) -> None:
        """End the sessions whose lease is over; called now and then."""
        now_s = self._now_s()
        while self._leases:
            session_id, until_s = next(iter(self._leases.items()))
            if until_s > now_s:
                return
            self.end(self._by_id[session_id])

    def end(self, session: Session) -> None:
        """Forget a session and release what it holds. Ending it twice is no work."""
        if session.ended:
            return
        session.ended = True
        del self._by_id[session.id]
        self._leases.pop(session.id, None)
        if session.token_hash is not None:
            self._by_token.pop(session.token_hash, None)
        self._by_number.pop((session.owner, session.number), None)
        self.per_tenant[session.tenant] -= 1
        if not self.per_tenant[session.tenant]:
            del self.per_tenant[session.tenant]
        self._journal.write(
            ("DELETE FROM sessions WHERE id=?", (session.id,)),
            ("DELETE FROM session_holds WHERE session=?", (session.id,)),
            ("DELETE FROM session_models WHERE session=?", (session.id,)),
            ("DELETE FROM vaccel_registrations WHERE session=?", (session.id,)),
        )
        for model in session.models or ():
            self._forget_user(session.tenant, model)
        self.on_end(session)
        for digest in session.holds or ():
            self._store.unhold(session.tenant, digest)
        session.holds = None
