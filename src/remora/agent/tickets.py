"""What waits for a turn, as values: a tenant's share, a model's plan, a ticket, and the tickets that run as one.

Values only: the order in which they run is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from remora.agent.hints import with_retry
from remora.errors import RemoraError, ResourceExhaustedError

#: (trust domain, model). A domain is one worker, whose device all its lanes share.
Lane = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Share:
    """What policy grants a tenant of every worker."""

    weight: float = 1.0
    priority: int = 0
    #: Requests that run at once; 0: no bound.
    concurrent: int = 0
    #: Requests that wait; 0: the node's own bound.
    queue: int = 0
    #: The rule that bounds the queue, as its refusal names it.
    queue_rule: str = ""


EVERYONE = Share()


def queue_full(share: Share, node_most: int, again_s: float) -> RemoraError:
    """Return the refusal of a tenant that has as many requests waiting as it may."""
    rule = share.queue_rule or "limits.queue_length_per_tenant"
    full = ResourceExhaustedError(
        f"{share.queue or node_most} requests of this tenant wait already ({rule})",
        fix="send fewer at a time, or ask the operator to raise it",
    )
    return with_retry(full, again_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is run on its device: measured, or said by the operator."""

    #: Most rows of one run; requests of one form are joined up to it.
    rows: int = 1
    #: How long a request may wait for company while the worker is busy. It never waits for an idle one.
    wait_s: float = 0.0
    #: Runs of this model at once; 0: as many as its worker takes.
    concurrent: int = 0
    #: (rows, how many times as long as a run of one row), by rows. From one measurement: what runs happen to take while
    #: the machine is busy says little about it.
    stretch: tuple[tuple[int, float], ...] = ()
    #: Most rows of one run while many wait (`most_rows`), if more than `rows`.
    backlog: int = 1

    @property
    def joins(self) -> bool:
        """True if requests may be joined at all."""
        return self.rows > 1 or self.backlog > 1

    def most_rows(self, waiting: int, slots: int) -> int:
        """Return how many rows the next run may have while so many wait.

        As many as `backlog` only if every slot could be filled with so many: then nobody is answered later for it.
        """
        return self.backlog if self.backlog > self.rows and waiting >= self.backlog * slots else self.rows

    def stretch_of(self, rows: int) -> float:
        """Return how many times as long as a run of one row one of so many takes; what is unknown gains nothing."""
        below, times = 1, 1.0
        for at, stretch in self.stretch:
            if at >= rows:
                return times + (stretch - times) * (rows - below) / max(1, at - below)
            below, times = at, stretch
        return times * rows / below


ALONE = Plan()


class Turn:
    """Tickets that run as one: they take one slot between them, until the last of them has ended."""

    __slots__ = ("learn", "left", "requests", "rows", "run_us")

    def __init__(self, requests: int, rows: int) -> None:
        self.left = self.requests = requests
        self.rows = rows
        self.run_us = 0
        #: False once a member failed: what the others took says little then.
        self.learn = True


class Ticket:
    """A request that waits for its turn."""

    __slots__ = (
        "charged_us",
        "deadline_s",
        "drop",
        "form",
        "held_s",
        "lane",
        "owner",
        "plan",
        "rows",
        "share",
        "since_s",
        "start",
        "state",
        "tenant",
        "turn",
    )

    WAITING, RUNNING, ENDED = range(3)

    def __init__(
        self,
        tenant: str,
        lane: Lane,
        start: Callable[[], None],
        drop: Callable[[RemoraError], None],
        deadline_s: float | None = None,
        share: Share = EVERYONE,
    ) -> None:
        self.share = share
        self.tenant = tenant
        self.lane = lane
        #: Called when its turn has come, unless it shares the turn with others (`FairScheduler.together`).
        self.start = start
        #: Called instead, when it will never come.
        self.drop = drop
        self.deadline_s = deadline_s
        self.charged_us = 0.0
        self.state = Ticket.WAITING
        self.since_s = 0.0
        #: When it began to wait for company; 0.0 if it did not.
        self.held_s = 0.0
        self.turn: Turn | None = None
        self.plan = ALONE
        #: What requests must have in common to run as one; None: this one runs by itself.
        self.form: Hashable = None
        self.rows = 1
        #: Whose ticket this is, for `together`.
        self.owner: object = None
