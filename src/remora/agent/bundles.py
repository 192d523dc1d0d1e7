"""vAccel's resources: an ordered list of blobs with one number, shared by the sessions that registered it.

The bytes lie in the store under their digests; here is only which of them form a resource, and who uses it. Numbers
are random and belong to a tenant: another tenant's number is unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from remora.agent.journal import Journal
from remora.agent.policy import Limits
from remora.agent.sessions import Session, Sessions, random_number
from remora.agent.store import Store
from remora.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError


@dataclass
class Bundle:
    """One vAccel resource."""

    id: int
    tenant: str
    kind: int
    digests: tuple[str, ...]
    sessions: set[str] = field(default_factory=set)


class Bundles:
    """All of them, written down so that they outlive the agent."""

    def __init__(self, journal: Journal, store: Store, sessions: Sessions, limits: Limits) -> None:
        self._journal = journal
        self._store = store
        self._sessions = sessions
        self._limits = limits
        self._by_tenant: dict[str, dict[int, Bundle]] = {}
        self._by_session: dict[str, set[int]] = {}
        for tenant, number, kind, digests in journal.rows("SELECT tenant, id, kind, blobs FROM vaccel_resources"):
            self._by_tenant.setdefault(tenant, {})[number] = Bundle(number, tenant, kind, tuple(json.loads(digests)))
        registered = list(
            journal.rows(
                "SELECT s.id, s.tenant, r.resource FROM vaccel_registrations r JOIN sessions s ON s.id = r.session"
            )
        )
        for session_id, tenant, number in registered:
            bundle = self._by_tenant.get(tenant, {}).get(number)
            if bundle is not None:
                self._note(bundle, session_id)

    def _note(self, bundle: Bundle, session_id: str) -> None:
        bundle.sessions.add(session_id)
        self._by_session.setdefault(session_id, set()).add(bundle.id)

    def find(self, tenant: str, number: int) -> Bundle:
        """
        Raises:
            NotFoundError: there is none, it is another tenant's, or its bytes are gone.
        """
        bundle = self._by_tenant.get(tenant, {}).get(number)
        if bundle is None or not all(self._store.owns(tenant, digest) for digest in bundle.digests):
            raise NotFoundError(f"Unknown resource {number}")  # vAccel's own words
        return bundle

    def create(self, session: Session, kind: int, digests: tuple[str, ...]) -> Bundle:
        """Make a resource of stored blobs and register it with a session. It is safe once `Sessions.settle` says so.

        Raises:
            ResourceExhaustedError: the tenant has too many, all of them in use.
        """
        mine = self._by_tenant.setdefault(session.tenant, {})
        if len(mine) >= self._limits.resources_per_tenant:
            unused = next((bundle for bundle in mine.values() if not bundle.sessions), None)
            if unused is None:
                raise ResourceExhaustedError(
                    f"this tenant has {len(mine)} resources registered (limits.resources_per_tenant)",
                    fix="unregister some, or ask the operator to raise it",
                )
            self._destroy(unused)
        bundle = Bundle(random_number(), session.tenant, kind, digests)
        self._by_tenant.setdefault(session.tenant, {})[bundle.id] = bundle
        self._journal.write(
            (
                "INSERT INTO vaccel_resources VALUES (?,?,?,?)",
                (bundle.tenant, bundle.id, kind, json.dumps(list(digests))),
            )
        )
        self.register(session, bundle)
        return bundle

    def register(self, session: Session, bundle: Bundle) -> None:
        """Let a session use a resource; twice is no work."""
        if session.id in bundle.sessions:
            return
        self._note(bundle, session.id)
        for digest in bundle.digests:
            self._sessions.hold(session, digest)
        self._journal.write(("INSERT OR IGNORE INTO vaccel_registrations VALUES (?,?)", (session.id, bundle.id)))

    def unregister(self, session: Session, bundle: Bundle) -> None:
        """End a session's use; a resource that nobody uses then is destroyed, as upstream does.

        Raises:
            InvalidArgumentError: it is not registered with the session.
        """
        if session.id not in bundle.sessions:
            raise InvalidArgumentError(f"resource {bundle.id} is not registered with session {session.number}")
        bundle.sessions.discard(session.id)
        mine = self._by_session.get(session.id, set())
        mine.discard(bundle.id)
        kept = {digest for number in mine for digest in self._by_tenant[session.tenant][number].digests}
        for digest in set(bundle.digests) - kept:
            self._sessions.unhold(session, digest)
        self._journal.write(
            ("DELETE FROM vaccel_registrations WHERE session=? AND resource=?", (session.id, bundle.id))
        )
        if not bundle.sessions:
            self._destroy(bundle)

    def _destroy(self, bundle: Bundle) -> None:
        mine = self._by_tenant.get(bundle.tenant, {})
        mine.pop(bundle.id, None)
        if not mine:
            self._by_tenant.pop(bundle.tenant, None)
        self._journal.write(
            ("DELETE FROM vaccel_resources WHERE tenant=? AND id=?", (bundle.tenant, bundle.id)),
        )
        others = {digest for other in mine.values() for digest in other.digests}
        for digest in set(bundle.digests) - others:
            self._store.release(bundle.tenant, digest)

    def session_ended(self, session: Session) -> None:
        """The session's registrations end; the resources stay for the tenant's next session, as upstream does."""
        for number in self._by_session.pop(session.id, ()):
            bundle = self._by_tenant.get(session.tenant, {}).get(number)
            if bundle is not None:
                bundle.sessions.discard(session.id)

    def forked(self, original: Session, copy: Session) -> None:
        """A clone's session gets its template's resources under the same numbers."""
        for number in sorted(self._by_session.get(original.id, ())):
            source = self._by_tenant[original.tenant][number]
            mine = self._by_tenant.setdefault(copy.tenant, {})
            bundle = mine.get(number)
            if bundle is None:
                bundle = mine[number] = Bundle(number, copy.tenant, source.kind, source.digests)
                self._journal.write(
                    (
                        "INSERT OR REPLACE INTO vaccel_resources VALUES (?,?,?,?)",
                        (copy.tenant, number, source.kind, json.dumps(list(source.digests))),
                    )
                )
            self.register(copy, bundle)

    def drop_tenant(self, tenant: str) -> None:
        """Forget a tenant that will not come back."""
        if self._by_tenant.pop(tenant, None) is not None:
            self._journal.write(("DELETE FROM vaccel_resources WHERE tenant=?", (tenant,)))
