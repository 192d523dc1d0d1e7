"""What is known of one connection to the agent, blocking or not: whether it lives, and the memory that it has."""

from __future__ import annotations

from remora.client import ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from remora.client.region import Region


class Health:
    """The health of a connection with a ttrpc client."""

    __slots__ = ("client", "generation", "suspect", "region", "asked")

    def __init__(self, client: Any) -> None:
        """
        Args:
            client: Tells by `closed` whether the connection is gone.
        """
        self.client = client
        self.generation = ready.generation()
        #: True after a deadline passed on it: alive and slow, or dead.
        self.suspect = False
        #: Memory shared with the agent, once a request wanted some and got it.
        self.region: Optional[Region] = None
        self.asked = False

    def is_usable(self) -> bool:
        return not self.client.closed and self.generation == ready.generation()

    def wanted_bytes(self, size_bytes: int, offered_bytes: int) -> int:
        """Return how much memory to ask the agent for now, for a request of that size; 0 if `region` is all there is.

        Args:
            offered_bytes: What the agent would share.
        """
        if self.region is not None and self.region.is_spent:
            self.region, self.asked = None, False
        if self.region is not None or self.asked:
            return 0
        self.asked = True  # others send messages meanwhile, and we do for good if it is refused
        from remora.client import region as regions

        return regions.wanted_bytes(size_bytes, offered_bytes)
