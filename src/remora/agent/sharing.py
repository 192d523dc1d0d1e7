"""Memory that the agent shares with clients of its own host, so that their tensors cross no socket.

A region belongs to one connection and goes with it: who has no connection any more needs no memory. Only a caller on
the agent's own Unix socket gets one; a guest's socket ends in a forwarder, through which no descriptor passes.
docs/decisions/0009-shared-memory-for-local-clients.md says what may be done with memory that a client writes to.
"""

from __future__ import annotations

from collections import Counter

from remora.agent.peers import Peer
from remora.agent.policy import Limits
from remora.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from remora.workers.contract import Region, Workers

#: Below this a region is not worth its descriptors; it bounds how many of them a tenant can have.
LEAST_BYTES = 1 << 20
_FIX = "send tensors in messages, or ask the operator to raise it"


class Sharing:
    """The regions of all connections."""

    def __init__(self, workers: Workers, limits: Limits) -> None:
        self._workers = workers
        self._limits = limits
        self.bytes_per_tenant: Counter[str] = Counter()

    def offered_bytes(self, peer: Peer) -> int:
        """Return how much a connection may have at most; 0: nothing."""
        most = self._limits.shared_bytes_per_connection
        return most if peer.local and most >= LEAST_BYTES else 0

    def share(self, peer: Peer, size_bytes: int) -> tuple[int, Region]:
        """Make a region for a connection; return its number there, and it.

        Raises:
            FailedPreconditionError: this connection cannot have any.
            InvalidArgumentError: it is too small.
            ResourceExhaustedError: the connection, or its tenant, has as much as it may.
        """
        if not self.offered_bytes(peer):
            raise FailedPreconditionError(
                "the agent shares no memory with this client",
                fix="send tensors in messages: Hello said share_bytes = 0",
            )
        if size_bytes < LEAST_BYTES:
            raise InvalidArgumentError(f"a region of {size_bytes} bytes", fix=f"ask for {LEAST_BYTES} or more")
        tenant, regions = peer.identity.tenant, peer.regions or {}
        for used, most, rule in (
            (sum(one.size for one in regions.values()), self._limits.shared_bytes_per_connection, "connection"),
            (self.bytes_per_tenant[tenant], self._limits.shared_bytes_per_tenant, "tenant"),
        ):
            if used + size_bytes > most:
                raise ResourceExhaustedError(
                    f"this {rule} shares {used} of {most} bytes (limits.shared_bytes_per_{rule})", fix=_FIX
                )
        region = self._workers.share(tenant, size_bytes)
        self.bytes_per_tenant[tenant] += region.size
        number = len(regions) + 1
        peer.regions = {**regions, number: region}
        return number, region

    def end(self, peer: Peer) -> None:
        """Take the regions of a connection that is gone from the workers."""
        regions, peer.regions = peer.regions, None
        peer.forms = None  # they name the regions, too
        for region in (regions or {}).values():
            tenant = peer.identity.tenant
            self.bytes_per_tenant[tenant] -= region.size
            if not self.bytes_per_tenant[tenant]:
                del self.bytes_per_tenant[tenant]
            self._workers.unshare(region)


def region_of(peer: Peer, number: int) -> Region:
    """Return a connection's own region.

    Raises:
        FailedPreconditionError: it has none of that number.
    """
    region = (peer.regions or {}).get(number)
    if region is None:
        raise FailedPreconditionError(
            f"this connection has no shared memory of number {number}", fix="send the tensors in the message"
        )
    return region
