"""One upload under way: how far it got, and who waits for its end. No files, no owners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remora.agent.files import Progress
from remora.agent.policy import Limits, StoreLimits
from remora.agent.rules import Terms
from remora.errors import FailedPreconditionError, InvalidArgumentError, RemoraError, ResourceExhaustedError

#: (bytes received, complete) of an upload, or why it failed.
PutDone = Callable[[tuple[int, bool] | RemoraError], None]


def check_quota(
    number: int, used_bytes: int, total_bytes: int, counts: Limits, limits: StoreLimits, terms: Terms | None
) -> None:
    """Refuse an upload that its tenant has no room for.

    Args:
        number: Resources and unfinished uploads that the tenant has.
        used_bytes: What they take.

    Raises:
        ResourceExhaustedError: names the limit or the rule.
    """
    if number >= counts.resources_per_tenant:
        raise ResourceExhaustedError(
            f"{number} resources are stored for this tenant (limits.resources_per_tenant)",
            fix="ask the operator to raise it",
        )
    granted: int | None = terms.values["stored_bytes"] if terms is not None else None
    if terms is not None and granted is not None:
        if used_bytes + total_bytes > granted:
            what = f"a resource of {total_bytes} bytes does not fit: {used_bytes} of {granted} bytes are used"
            raise terms.exhausted("stored_bytes", what, limits.max_age_s)
    elif used_bytes + total_bytes > limits.tenant_bytes:
        raise ResourceExhaustedError(
            f"a resource of {total_bytes} bytes does not fit: {used_bytes} of {limits.tenant_bytes} bytes are used "
            "(store.tenant_bytes)",
            fix="use fewer resources, or ask the operator to raise it",
        )


class Upload:
    """One resource on its way from one tenant; several connections may send it at the same time."""

    __slots__ = (
        "active_s",
        "counted_bytes",
        "dropped",
        "path",
        "progress",
        "submitted_bytes",
        "total_bytes",
        "waiters",
    )

    def __init__(self, path: Path, received_bytes: int, total_bytes: int) -> None:
        self.path = path
        self.progress = Progress(received_bytes)
        #: Received, and handed to the disk thread.
        self.submitted_bytes = received_bytes
        #: Its part of the store's `bytes_stored`.
        self.counted_bytes = received_bytes
        self.total_bytes = total_bytes
        #: Who else wants to know how it ends: connections that upload the same at the same time.
        self.waiters: list[PutDone] = []
        self.dropped = False
        #: When its last chunk came, on the monotonic clock.
        self.active_s = 0.0

    def end(self, outcome: tuple[int, bool] | RemoraError, done: PutDone) -> None:
        """Tell everyone how it ended."""
        for waiter in (done, *self.waiters):
            waiter(outcome)

    def check_chunk(self, offset: int, total_bytes: int, length: int) -> None:
        """Refuse a chunk that does not belong where it says.

        Raises:
            InvalidArgumentError: it does not fit what was announced.
            FailedPreconditionError: bytes before it are missing.
        """
        if total_bytes != self.total_bytes:
            raise InvalidArgumentError(
                f"this upload was announced with {self.total_bytes} bytes, now with {total_bytes}",
                fix="send the same total_bytes with every chunk",
            )
        if not length or offset + length > total_bytes:
            raise InvalidArgumentError(
                f"a chunk of {length} bytes at offset {offset} is not part of {total_bytes} bytes",
                fix="send non-empty chunks that end at total_bytes",
            )
        if offset > self.submitted_bytes:
            raise FailedPreconditionError(
                f"a chunk at offset {offset} would leave a hole: {self.submitted_bytes} bytes were received",
                fix=f"send the chunk at offset {self.submitted_bytes}",
            )
