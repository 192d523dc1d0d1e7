"""The agent without its sockets: what every door may use, put together once.

Doors know this and their protocol; nothing here knows a protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from remora.agent.answers import Answers
from remora.agent.cards import CatalogueEntry
from remora.agent.disk import DiskPool
from remora.agent.execution import Execution
from remora.agent.exposition import Exposition
from remora.agent.files import ResourceFiles
from remora.agent.grants import Grants
from remora.agent.identity import Identity, holder_of
from remora.agent.journal import Journal
from remora.agent.libraries import Libraries
from remora.agent.logs import Log
from remora.agent.metrics import Metrics
from remora.agent.models import Models
from remora.agent.notebook import Notebook
from remora.agent.peers import Peer, Peers
from remora.agent.policy import Policy
from remora.agent.quotas import Quotas
from remora.agent.refusals import explain, of_limit
from remora.agent.residency import Residency
from remora.agent.scheduler import FairScheduler
from remora.agent.sessions import Session, Sessions
from remora.agent.sharing import Sharing
from remora.agent.store import Store
from remora.agent.tickets import Lane
from remora.agent.tracing import Tracer
from remora.agent.tuning import Tuning
from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.workers.contract import Workers

#: How long a tenant's workers and shared memory stay after its last session.
_LINGER_S = 30.0
_SWEEP_S = 1.0
_STORE_SWEEP_S = 60.0


class Core:
    """Sessions, store, models, scheduler and execution of one node."""

    def __init__(
        self,
        reactor: Reactor,
        state: Path,
        policy: Policy,
        workers: Workers,
        catalogue: Mapping[str, CatalogueEntry],
        log: Log,
    ) -> None:
        self.reactor = reactor
        self.policy = policy
        self.limits = policy.limits
        self.workers = workers
        self.log = log
        self.metrics = Metrics()
        self.exposition = Exposition(self.metrics)
        self.journal = Journal(state / "journal.sqlite", reactor.post, self._journal_failed)
        self.disk = DiskPool(reactor.post, self._disk_failed)
        self.files = ResourceFiles(state)
        self.store = Store(self.files, self.journal, self.disk, policy.store, policy.limits)
        self.sessions = Sessions(self.journal, self.store, policy.limits, time.monotonic, self._session_ended)
        self.quotas = Quotas(policy.rules, time.monotonic)
        self.grants = Grants(self.journal, self.quotas.regranted)
        self.quotas.granted = self.grants.of
        self.libraries = Libraries(workers, self.store, self.quotas, policy.workers.libraries, time.monotonic)
        notebook = Notebook(state / "models.json", self.disk)
        self.tuning = Tuning(workers, notebook, policy.workers, time.monotonic)
        self.residency = Residency(
            policy.workers.budget_bytes,
            time.monotonic,
            lambda lane: self.scheduler.busy(lane),
            self._evict,
        )
        self.models = Models(catalogue, workers, self.store, self.sessions, self.disk, self.tuning, self.residency)
        self.scheduler = FairScheduler(
            workers.slots, time.monotonic, policy.limits.queue_length_per_tenant, reactor.call_later
        )
        self.scheduler.on_idle = self._lane_idle
        self.tuning.on_memory = self.residency.grown
        self.tuning.seed = self.scheduler.seed
        self.answers = Answers(policy.limits)
        self.models.terms = lambda session: self.quotas.terms(session.owner, session.tenant)
        self.models.on_spent = lambda session, used_s: self.charge(session.owner, session.tenant, used_s)
        self.sessions.quotas = self.store.quotas = self.quotas
        self.execution = Execution(
            workers,
            self.models,
            self.sessions,
            self.scheduler,
            self.answers,
            self.metrics,
            reactor.call_soon,
            self.libraries,
            self.quotas,
            policy.limits.queue_length_per_tenant,
        )
        self.sharing = Sharing(workers, policy.limits)
        self.peers = Peers(policy.limits, workers.allocate, self.answers.forget_tenant, self._left)
        self.peers.quotas = self.quotas
        self.peers.on_join = self._joined
        workers.on_death = self._worker_died
        #: Follows requests for OpenTelemetry, where a collector is configured; and requests exported, lost, dropped.
        self.tracer: Tracer | None = None
        self.trace_counts: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        #: Doors that keep something of their own for a session add themselves.
        self.on_session_end: list[Callable[[Session], None]] = []
        self.on_tenant_gone: list[Callable[[str], None]] = []
        #: File and text of the policy in effect, and why the last reload was refused.
        self.policy_source = ("", "", "")
        self._last_store_sweep_s = time.monotonic()
        self._closed = False
        reactor.call_later(_SWEEP_S, self._sweep)

    def _evict(self, lane: Lane) -> None:
        domain, model = lane
        self.models.evict(lane)
        self.log.of_tenant(domain, "model unloaded to make room for another", level="info", model=model)

    def _lane_idle(self, lane: Lane) -> None:
        self.tuning.idle(lane)
        self.residency.idle(lane)

    def charge(self, key: str, tenant: str, used_s: float) -> None:
        """Have a tenant pay for time that no run of a model shows: its uploads are loaded, its text is read."""
        used_us = int(used_s * 1e6)
        terms = self.quotas.terms(key, tenant)
        self.quotas.charge(tenant, terms, used_us)
        self.scheduler.charge(tenant, used_us, terms.share.weight)

    def message_bytes(self, identity: Identity) -> int:
        """Return the largest message that a caller may send."""
        return self.message_limit(identity)[0]

    def message_limit(self, identity: Identity) -> tuple[int, str]:
        """Return the largest message that a caller may send, and how a refusal names what says so."""
        terms = self.quotas.terms(identity.key, identity.tenant)
        granted: int | None = terms.values["message_bytes"]
        return (
            (granted, terms.rule("message_bytes")) if granted else (self.limits.message_bytes, "limits.message_bytes")
        )

    # -- sessions and tenants ---------------------------------------------------------------------------------------

    def open_session(self, peer: Peer, session: Session) -> None:
        """Make a connection the one of a native session; another one, perhaps a dead one, is closed."""
        other = session.peer
        if isinstance(other, Peer) and other is not peer and other.connection is not None:
            other.connection.close()
        session.peer = peer
        peer.session = session
        self.use_session(peer, session)

    def use_session(self, peer: Peer, session: Session) -> None:
        """Note that a connection uses a session: while any does, its lease does not run."""
        if peer.sessions is None:
            peer.sessions = set()
        if session not in peer.sessions:
            peer.sessions.add(session)
            self.sessions.connected(session)

    def _joined(self, identity: Identity) -> None:
        self.quotas.note(identity.key, identity.labels)
        self.metrics.came(identity.tenant)
        self.metrics.pods.note(identity)

    def _left(self, peer: Peer) -> None:
        self.quotas.left(peer.identity.key)
        for run in list(peer.runs or ()):
            self.execution.cancel(run)
        for session in peer.sessions or ():
            if session.peer is peer:
                session.peer = None
            self.sessions.disconnected(session)
        peer.session = peer.sessions = None
        self.sharing.end(peer)
        self._linger(peer.identity.tenant)

    def _session_ended(self, session: Session) -> None:
        self.execution.session_ended(session)
        self.models.session_ended(session)
        for callback in self.on_session_end:
            callback(session)
        self._linger(session.tenant)

    def _linger(self, tenant: str) -> None:
        if not self._in_use(tenant):
            self.reactor.call_later(_LINGER_S, lambda: self._release_idle(tenant))

    def _in_use(self, tenant: str) -> bool:
        return bool(self.sessions.per_tenant.get(tenant) or self.peers.per_tenant.get(tenant))

    def _release_idle(self, tenant: str) -> None:
        if not self._closed and not self._in_use(tenant):
            self.release_tenant(tenant)

    def release_tenant(self, tenant: str) -> None:
        """Give back the processes and the memory of a tenant who is not here."""
        self.metrics.left(tenant)
        self.answers.forget_tenant(tenant)
        self.models.forget_domain(tenant)
        self.libraries.forget_tenant(tenant)
        self.scheduler.forget(tenant)
        self.workers.release_domain(tenant)

    def end_identity(self, identity: Identity, keep_sessions: bool) -> None:
        """A sandbox is gone: end its connections, its sessions unless they are kept, and what only they had."""
        for peer in self.peers.of_key(identity.key):
            if peer.connection is not None:
                peer.connection.close()
        self.quotas.forget(identity.key)
        self.metrics.pods.forget(identity.key)
        tenants = {identity.tenant}
        if not keep_sessions:
            for session in self.sessions.of_owner(identity.key):
                tenants.add(session.tenant)
                self.sessions.end(session)
        for tenant in tenants:
            # A tenant that is one sandbox does not come back; a named one has other sandboxes, now or later.
            if tenant == identity.key and not self._in_use(tenant):
                for callback in self.on_tenant_gone:
                    callback(tenant)
                self.store.drop_tenant(tenant)
                self.release_tenant(tenant)

    def _journal_failed(self, error: RemoraError) -> None:
        """What happened is right in memory; after a crash the agent would know an older state."""
        self.log.error("journal write failed", error=str(error))

    def _disk_failed(self, error: BaseException) -> None:
        self.log.error("a file could not be removed", error=str(error))

    def ready(self) -> tuple[bool, str]:
        """Return whether a new request would be served, and if not, why."""
        if self.execution.closed is not None:
            return False, "draining"
        if self.policy.workers.standby and not any(worker.memory_bytes for worker in self.workers.workers()):
            return False, "no worker runs"  # a process that has died has no memory
        return True, "ready"

    def present(self, identity: Identity, grants: Iterable[str]) -> None:
        """Give a sandbox the grants that it presents; one that is refused some is served all the same."""
        for reason in self.grants.present(holder_of(identity.key, identity.labels), grants):
            self.log.error("grant refused", sandbox=identity.sandbox, reason=reason)

    # -- reporting --------------------------------------------------------------------------------------------------

    def refused(self, door: str, method: str, peer: Peer, error: RemoraError, *, model: str = "") -> None:
        """Count and log a request that was refused or failed."""
        tenant = peer.identity.tenant
        refusal = explain(error, self.policy, self.policy_source[0])
        self.metrics.answered(door, method, tenant, refusal.code)
        self.metrics.refused(tenant, refusal.rule)
        cause = error.__cause__
        self.log.of_tenant(
            tenant,
            "request refused",
            peer=peer.identity.key,
            door=door,
            operation=method,
            model=model,
            session=peer.session.id if peer.session is not None else "",
            code=refusal.code,
            rule=refusal.rule,
            value=refusal.value,
            error=error.message,
            told=error.fix or "",
            change=refusal.change,
            **({"cause": f"{type(cause).__name__}: {cause}"} if cause is not None else {}),
        )

    def _worker_died(self, domain: str, reason: str) -> None:
        """A worker's death is no error of the agent's; a tenant that kills its own all day has a budget of lines."""
        fields = {"domain": domain, "reason": reason, "change": "none: it is started again, jobs in flight once more"}
        self.log.of_tenant(domain, "worker died", **fields)

    # -- time -------------------------------------------------------------------------------------------------------

    def deadline_s(self, asked_s: float | None) -> float:
        """Return the deadline of a request: the client's, but never later than the node allows."""
        latest_s = time.monotonic() + self.limits.request_timeout_s
        return latest_s if asked_s is None or asked_s > latest_s else asked_s

    def _sweep(self) -> None:
        if self._closed:
            return
        self.reactor.call_later(_SWEEP_S, self._sweep)
        self.sessions.expire()
        self.scheduler.expire()
        self.tuning.sweep()
        self.residency.sweep()
        self.log.sweep()
        self.store.tidy()
        self.libraries.sweep()
        for peer, limit in self.peers.sweep():
            refusal = of_limit(limit, self.policy, self.policy_source[0])
            self.log.of_tenant(
                peer.identity.tenant,
                "connection closed",
                peer=peer.identity.key,
                rule=limit,
                value=refusal.value,
                change=refusal.change,
            )
            self.metrics.refused(peer.identity.tenant, limit)
            if peer.connection is not None:
                peer.connection.close()
        now_s = time.monotonic()
        if now_s - self._last_store_sweep_s > _STORE_SWEEP_S:
            self._last_store_sweep_s = now_s
            self.store.sweep()

    def close(self) -> None:
        """End the workers, finish what is being written, and close the journal. Sessions stay written down."""
        self._closed = True
        self.workers.close()
        self.disk.close()
        self.journal.close()
