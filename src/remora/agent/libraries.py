"""Shared libraries that tenants have uploaded: who may run which, and which are loaded.

A library is code of its tenant's, so each runs in a worker for itself that may die at any moment (`workers.pool`). One
that nobody has called for a while is ended, and a tenant has at most `workers.libraries` of them: the one that was
called longest ago makes room. Nothing is kept for the next agent: a library is loaded when it is called.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.agent.quotas import Quotas
from remora.agent.sessions import Session
from remora.agent.store import Store
from remora.errors import NotFoundError, PermissionDeniedError, RemoraError, ResourceExhaustedError
from remora.workers.contract import LIBRARY, ModelSource, ModelSpec, Workers, library_domain

#: A library's worker ends when it has had nothing to do for this long.
IDLE_S = 60.0

SpecDone = Callable[[ModelSpec | RemoraError], None]


@dataclass
class _Library:
    digests: tuple[str, ...]
    source: ModelSource | None = None  # once its files are verified
    users: int = 0  # runs under way
    used_s: float = 0.0


class Libraries:
    """All tenants' libraries. A key names one: the library's digest, with a mark of what it needs, if anything."""

    def __init__(self, workers: Workers, store: Store, quotas: Quotas, limit: int, now_s: Callable[[], float]) -> None:
        self._workers = workers
        self._store = store
        self._quotas = quotas
        self._limit = limit
        self._now_s = now_s
        self._tenants: dict[str, OrderedDict[str, _Library]] = {}  # longest unused first

    def check(self, session: Session, digests: Sequence[str]) -> None:
        """
        Raises:
            PermissionDeniedError: policy allows no library, or not this one; names the rule.
        """
        terms = self._quotas.terms(session.owner, session.tenant)
        if not terms.values["exec"]:
            raise PermissionDeniedError(
                f"exec is off: no library is run for this tenant ({terms.rule('exec')})",
                fix="send a model and use its load and run operations, or ask the operator to allow it",
            )
        for digest in digests:
            terms.check("libraries", digest)

    def key(self, session: Session, digests: Sequence[str]) -> str:
        """Return the name under which a library is run: the last of `digests`, with the others loaded before it.

        Raises:
            PermissionDeniedError: as `check`.
            NotFoundError: the tenant has no such resource.
            ResourceExhaustedError: too many libraries are in use at once.
        """
        self.check(session, digests)
        for digest in digests:
            if not self._store.owns(session.tenant, digest):
                raise NotFoundError(f"there is no resource {digest}", fix="upload it first")
        key = digests[-1]
        if len(digests) > 1:
            key += "+" + hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
        mine = self._tenants.setdefault(session.tenant, OrderedDict())
        if key not in mine:
            self._make_room(session.tenant, mine)
            mine[key] = _Library(tuple(digests))
        mine.move_to_end(key)
        mine[key].used_s = self._now_s()
        return key

    def _find(self, tenant: str, key: str) -> _Library | None:
        mine = self._tenants.get(tenant)
        return mine.get(key) if mine is not None else None

    def _make_room(self, tenant: str, mine: OrderedDict[str, _Library]) -> None:
        if len(mine) < self._limit:
            return
        unused = next((key for key, library in mine.items() if not library.users), None)
        if unused is None:
            raise ResourceExhaustedError(
                f"this tenant runs {len(mine)} libraries now (workers.libraries)", fix="wait for one of them to return"
            )
        self._end(tenant, unused)

    # -- what execution asks, as of models ----------------------------------------------------------------------------

    def domain_for(self, session: Session, key: str) -> str:
        """
        Raises:
            NotFoundError: `key` is none that the tenant got from `key`, or its worker has been ended since.
        """
        if self._find(session.tenant, key) is None:
            raise NotFoundError(f"library {key} is not in use", fix="call it again")
        return library_domain(session.tenant, key)

    def begin(self, session: Session, key: str, done: SpecDone) -> None:
        """Get the library loaded and keep it so until `finish`. Files are verified before they are first loaded."""
        tenant = session.tenant
        library = self._tenants[tenant][key]
        library.users += 1

        def loaded(outcome: ModelSpec | RemoraError) -> None:
            if isinstance(outcome, RemoraError) and self._find(tenant, key) is library:
                self._end(tenant, key)
            done(outcome)

        if library.source is not None:
            self._workers.load(library_domain(tenant, key), library.source, loaded)
            return
        paths: list[Path] = []

        def opened(outcome: Path | RemoraError | None) -> None:
            if isinstance(outcome, RemoraError):
                loaded(outcome)
                return
            if outcome is not None:
                paths.append(outcome)
            if len(paths) < len(library.digests):
                try:
                    self._store.open(tenant, library.digests[len(paths)], opened)
                except RemoraError as error:
                    loaded(error)
                return
            needs = tuple(zip(library.digests[:-1], paths[:-1], strict=True))
            library.source = ModelSource(key, library.digests[-1], paths[-1], LIBRARY, needs=needs)
            if self._find(tenant, key) is library:
                self._workers.load(library_domain(tenant, key), library.source, loaded)
            else:
                loaded(NotFoundError(f"library {key} is not in use any more", fix="call it again"))

        opened(None)

    def finish(self, session: Session, key: str) -> None:
        """A run is over."""
        library = self._find(session.tenant, key)
        if library is not None:
            library.users = max(0, library.users - 1)
            library.used_s = self._now_s()

    # -- the end ------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """End what nobody has called for long; called now and then."""
        oldest_s = self._now_s() - IDLE_S
        for tenant, mine in list(self._tenants.items()):
            for key in [key for key, library in mine.items() if not library.users and library.used_s < oldest_s]:
                self._end(tenant, key)

    def forget_tenant(self, tenant: str) -> None:
        """The tenant's workers are gone."""
        self._tenants.pop(tenant, None)

    def _end(self, tenant: str, key: str) -> None:
        mine = self._tenants[tenant]
        del mine[key]
        if not mine:
            del self._tenants[tenant]
        self._workers.release_domain(library_domain(tenant, key))
