"""The connections of callers: how many there may be, what each may have in flight, and when one is given up.

A peer is a connection with the identity that its socket has. What it says comes to a door; who it is was settled here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

from remora.agent.execution import Run
from remora.agent.hints import with_retry
from remora.agent.identity import Identity
from remora.agent.policy import Limits
from remora.agent.quotas import Quotas
from remora.agent.sessions import Session
from remora.errors import RemoraError, ResourceExhaustedError
from remora.workers.contract import Block, Region
from remora.workers.settings import machine_memory_bytes

if TYPE_CHECKING:
    from remora.agent.doors.inference import Form


#: Of the agent's connections one in so many is kept back for tenants with few.
_KEPT = 8
#: When somebody may have left, as a guess.
_AGAIN_S = 1.0


class Connection(Protocol):
    """What a peer needs of its connection, whichever door it came through."""

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""

    @property
    def out_bytes(self) -> int:
        """Bytes of answers that are not sent yet."""

    @property
    def receiving(self) -> bool:
        """True if a part of a request has come."""

    def leave(self, *, gently: bool) -> None:
        """Close once nothing is under way; called again and again until it is closed."""

    def close(self) -> None: ...


class Peer:
    """One connection. Small on purpose: ten thousand idle ones wait on a node."""

    __slots__ = (
        "active_s",
        "connection",
        "forms",
        "greeting",
        "identity",
        "local",
        "made_s",
        "regions",
        "requests",
        "runs",
        "session",
        "sessions",
    )

    def __init__(self, identity: Identity, now_s: float) -> None:
        self.identity = identity
        self.connection: Connection | None = None
        #: Opened by Hello; a vAccel connection has none, its requests name theirs.
        self.session: Session | None = None
        #: Hello is on its way: a second one must not open a second session.
        self.greeting = False
        #: All sessions used over this connection; their leases do not run meanwhile.
        self.sessions: set[Session] | None = None
        self.runs: set[Run] | None = None
        self.made_s = now_s
        self.active_s = now_s
        self.requests = 0
        #: On the agent's own Unix socket: descriptors can be passed to it.
        self.local = False
        #: Requests that it has sent before, by their bytes (`agent.doors.inference`).
        self.forms: dict[bytes, Form] | None = None
        #: Memory shared with it, by number (`agent.sharing`).
        self.regions: dict[int, Region] | None = None

    def add_run(self, run: Run) -> None:
        if self.runs is None:
            self.runs = set()
        self.runs.add(run)

    def remove_run(self, run: Run) -> None:
        if self.runs is not None:
            self.runs.discard(run)


class _CountedBlock:
    """A block of a tenant's shared memory that counts against the tenant's bytes in flight."""

    __slots__ = ("_block", "_count", "_tenant", "view")

    def __init__(self, block: Block, count: Callable[[str, int], None], tenant: str) -> None:
        self._block: Block | None = block
        self._count = count
        self._tenant = tenant
        self.view = block.view
        count(tenant, len(block.view))

    def release(self) -> None:
        block, self._block = self._block, None
        if block is None:
            return
        self._count(self._tenant, -len(self.view))
        self.view = memoryview(b"")
        block.release()


class Peers:
    """All connections of callers, by tenant."""

    def __init__(
        self,
        limits: Limits,
        allocate: Callable[[str, int], Block],
        reclaim: Callable[[str], bool],
        on_left: Callable[[Peer], None],
    ) -> None:
        """
        Args:
            allocate: Shared memory of a tenant (`Workers.allocate`).
            reclaim: Gives back memory that a tenant's remembered answers hold; True if that freed any.
            on_left: Called once for each peer whose connection is gone.
        """
        self._limits = limits
        self._allocate = allocate
        self._reclaim = reclaim
        self._on_left = on_left
        self.quotas: Quotas | None = None
        #: Called with the identity of each new connection.
        self.on_join: Callable[[Identity], None] = lambda _identity: None
        self._peers: set[Peer] = set()
        self.per_tenant: Counter[str] = Counter()
        self.in_flight_bytes: Counter[str] = Counter()
        self._all_in_flight_bytes = 0
        self._most_in_flight_bytes = limits.in_flight_bytes or machine_memory_bytes() // 4

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers)

    def check_room(self, identity: Identity) -> None:
        """
        Raises:
            ResourceExhaustedError: there are too many connections; the message names the limit.
        """
        tenant, total, most = identity.tenant, len(self._peers), self._limits.connections
        used = self.per_tenant.get(tenant, 0)
        # What is kept back is for those who have less than their share of it: a few tenants cannot take it all.
        kept = most // _KEPT
        share = kept // (len(self.per_tenant) + (not used))
        if total >= most or (total >= most - kept and used > 0 and used >= share):
            raise with_retry(
                ResourceExhaustedError(
                    f"the agent has {total} of {most} connections, this tenant {used} (limits.connections)",
                    fix="connect again later, or ask the operator to raise it",
                ),
                _AGAIN_S,
            )
        terms = self.quotas.terms(identity.key, tenant) if self.quotas is not None else None
        granted: int | None = terms.values["connections"] if terms is not None else None
        if used < (granted or self._limits.connections_per_tenant):
            return
        if terms is not None and granted is not None:
            raise terms.exhausted("connections", f"this tenant has {used} connections", _AGAIN_S)
        raise ResourceExhaustedError(
            f"this tenant has {self._limits.connections_per_tenant} connections (limits.connections_per_tenant)",
            fix="use fewer connections: one carries many requests at once",
        )

    def join(self, identity: Identity) -> Peer:
        self.on_join(identity)
        peer = Peer(identity, time.monotonic())
        self._peers.add(peer)
        self.per_tenant[identity.tenant] += 1
        return peer

    def leave(self, peer: Peer) -> None:
        if peer not in self._peers:
            return
        self._peers.discard(peer)
        tenant = peer.identity.tenant
        self.per_tenant[tenant] -= 1
        if not self.per_tenant[tenant]:
            del self.per_tenant[tenant]
        self._on_left(peer)

    def under_way(self) -> int:
        """Return how many requests and answers are on their way in or out, on all connections."""
        found = 0
        for peer in self._peers:
            if (connection := peer.connection) is not None:
                found += connection.in_flight or int(connection.receiving or connection.out_bytes > 0)
        return found

    def of_key(self, key: str) -> list[Peer]:
        return [peer for peer in self._peers if peer.identity.key == key]

    def _count(self, tenant: str, size_bytes: int) -> None:
        self._all_in_flight_bytes += size_bytes
        self.in_flight_bytes[tenant] += size_bytes
        if not self.in_flight_bytes[tenant]:
            del self.in_flight_bytes[tenant]

    def _check_bytes(self, tenant: str, size_bytes: int) -> None:
        used, most = self.in_flight_bytes.get(tenant, 0), self._limits.in_flight_bytes_per_tenant
        if used + size_bytes > most:
            raise ResourceExhaustedError(
                f"a message of {size_bytes} bytes does not fit: this tenant has {used} of "
                f"{most} bytes in flight (limits.in_flight_bytes_per_tenant)",
                fix="wait for answers before sending more",
            )
        # The second half of the node's memory for messages is for those who have less than their share of the first.
        total, most = self._all_in_flight_bytes + size_bytes, self._most_in_flight_bytes
        share = most // 2 // (len(self.in_flight_bytes) + (tenant not in self.in_flight_bytes))
        if total > most or (total > most // 2 and used + size_bytes > share):
            raise with_retry(
                ResourceExhaustedError(
                    f"a message of {size_bytes} bytes does not fit: all tenants have {total - size_bytes} of {most} "
                    f"bytes in flight, this one {used} (limits.in_flight_bytes)",
                    fix="wait for answers before sending more",
                ),
                0.1,
            )

    def hold(self, tenant: str, size_bytes: int) -> Callable[[], None]:
        """Count the bytes of an answer that lies in the agent's own memory; returns what to call once they are sent.

        Raises:
            ResourceExhaustedError: the tenant, or all of them, have too many bytes in flight.
        """
        self._check_bytes(tenant, size_bytes)
        self._count(tenant, size_bytes)
        return partial(self._count, tenant, -size_bytes)

    def allocate(self, tenant: str, size_bytes: int) -> _CountedBlock:
        """Return memory for one incoming message.

        Raises:
            ResourceExhaustedError: as `hold`, or the tenant's shared memory is full.
        """
        self._check_bytes(tenant, size_bytes)
        try:
            block = self._allocate(tenant, size_bytes)
        except RemoraError:
            if not self._reclaim(tenant):
                raise
            block = self._allocate(tenant, size_bytes)
        return _CountedBlock(block, self._count, tenant)

    def sweep(self) -> list[tuple[Peer, str]]:
        """Return the connections to give up, each with the limit that says so; called now and then."""
        now_s = time.monotonic()
        late = []
        for peer in self._peers:
            if not peer.requests and now_s - peer.made_s > self._limits.hello_timeout_s:
                late.append((peer, "limits.hello_timeout_s"))
            elif not peer.runs and now_s - peer.active_s > self._limits.idle_timeout_s:
                late.append((peer, "limits.idle_timeout_s"))
        return late
