"""Who goes next: a fair queue between tenants for every model, in front of a bounded number of jobs in flight.

Fairness is start-time fair queueing: each tenant has a virtual time that grows by the cost of what it ran, divided by
its weight, and the tenant that is furthest behind goes next. A tenant that was idle starts at the present, so it cannot
save up. The cost of a job is estimated from the time its model took before, and corrected by the time it took.

A priority is a head start of bounded length: a tenant may be ahead of its share by that much device time before it
waits like everyone else. So it makes answers early and starves nobody.

While tenants compete for a lane nothing waits inside the worker: a job there would be ahead of whoever comes next.

No sockets, no workers: `start` and `drop` of a ticket do whatever running and refusing means.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from remora.agent.hints import with_retry
from remora.errors import DeadlineExceededError, RemoraError, ResourceExhaustedError

#: (trust domain, model).
Lane = tuple[str, str]
#: What a job of a model that never ran is expected to cost.
_FIRST_GUESS_US = 1000.0
#: Weight of the newest measurement in the estimate.
_SMOOTHING = 0.2
#: Head start of one step of priority.
_HEAD_START_US = 50_000.0
#: Tenants compete in a lane for this long after two of them last took turns.
_CONTENDED_S = 1.0
#: Below this a job that waits inside the worker delays nobody noticeably, and saves a turn of the agent's loop.
_SHORT_US = 1000.0
#: An estimate older than this, and than ten times itself, refuses nobody: the next run shows what is true now.
_STALE_S = 1.0
#: Deadlines of tickets that wait no more, beyond which the list is cleaned.
_SLACK = 1000
_NODE_RULE = "limits.queue_length_per_tenant"


@dataclass(frozen=True, slots=True)
class Share:
    """What policy grants a tenant of every lane."""

    weight: float = 1.0
    priority: int = 0
    #: Requests that run at once; 0: no bound.
    concurrent: int = 0
    #: Requests that wait; 0: the node's own bound.
    queue: int = 0
    #: The rule that bounds the queue, as its refusal names it.
    queue_rule: str = ""


EVERYONE = Share()


class Ticket:
    """A request that waits for its turn."""

    __slots__ = ("charged_us", "deadline_s", "drop", "lane", "share", "start", "state", "tenant")

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
        #: Called when its turn has come.
        self.start = start
        #: Called instead, when it will never come.
        self.drop = drop
        self.deadline_s = deadline_s
        self.charged_us = 0.0
        self.state = Ticket.WAITING


class Scheduler(Protocol):
    """The contract that the agent's core relies on."""

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket, or start it at once.

        Raises:
            ResourceExhaustedError: the tenant's queue is full.
            DeadlineExceededError: it would be too late.
        """

    def finished(self, ticket: Ticket, run_us: int, *, measured: bool = True) -> None:
        """The ticket's job ended after `run_us`; the next may start. Not `measured`: charged, but nothing learnt."""

    def cancel(self, ticket: Ticket) -> bool:
        """Take a waiting ticket out of the queue without calling it. False if it waits no more."""

    def expire(self) -> None:
        """Drop the tickets whose deadline is over."""


class _Queues:
    """The waiting tickets of one lane."""

    __slots__ = (
        "by_tenant",
        "capped",
        "contended_until_s",
        "deviation_us",
        "estimate_us",
        "last_tenant",
        "measured_s",
        "order",
        "running",
        "runs",
    )

    def __init__(self) -> None:
        self.by_tenant: dict[str, deque[Ticket]] = {}
        #: Tenants that wait for one of their own requests to end, with the serial of their entry.
        self.capped: dict[str, int] = {}
        self.contended_until_s = 0.0
        self.last_tenant = ""
        self.deviation_us = 0.0
        self.measured_s = 0.0
        self.runs = 0
        #: (virtual time when it was pushed, serial, tenant): one entry for each tenant that waits.
        self.order: list[tuple[float, int, str]] = []
        self.running = 0
        self.estimate_us = _FIRST_GUESS_US

    def learn(self, run_us: int, now_s: float) -> None:
        off = run_us - self.estimate_us
        # The first run says more than the guess, though it may be a slow one.
        self.estimate_us += (_SMOOTHING if self.runs else 1.0) * off
        self.deviation_us += _SMOOTHING * (abs(off) - self.deviation_us) if self.runs else 0.0
        self.runs += 1
        self.measured_s = now_s

    def least_us(self, now_s: float) -> float:
        """Return how long a run takes at least, as far as that is known; 0 if it is not."""
        age_s = now_s - self.measured_s
        if self.runs < 3 or (age_s > _STALE_S and age_s > self.estimate_us / 1e5):
            return 0.0
        return max(0.0, self.estimate_us - 2 * self.deviation_us)


class FairScheduler:
    """See the module's docstring and `Scheduler`."""

    def __init__(
        self, slots: Callable[[str, str], int], now_s: Callable[[], float], queue_length_per_tenant: int
    ) -> None:
        self._slots = slots
        self._now_s = now_s
        self._queue_length = queue_length_per_tenant
        self._lanes: dict[Lane, _Queues] = {}
        self._virtual: dict[str, float] = {}
        self._present = 0.0
        #: Tickets of each tenant that are with a worker, and that wait.
        self.running: Counter[str] = Counter()
        self._capped: dict[str, set[Lane]] = {}  # tenant -> lanes in which it waits for its own requests
        self._active: Counter[str] = Counter()  # tickets waiting or running
        self.waiting: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._serial = 0

    def submit(self, ticket: Ticket) -> None:
        tenant, share, now_s = ticket.tenant, ticket.share, self._now_s()
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            lane = self._lanes[ticket.lane] = _Queues()
        most = share.queue or self._queue_length
        if self.waiting[tenant] >= most:
            raise with_retry(
                ResourceExhaustedError(
                    f"{most} requests of this tenant wait already ({share.queue_rule or _NODE_RULE})",
                    fix="send fewer at a time, or ask the operator to raise it",
                ),
                lane.estimate_us / 1e6,
            )
        self._check_time(lane, ticket, now_s)
        if lane.last_tenant != tenant:
            if lane.last_tenant:
                lane.contended_until_s = now_s + _CONTENDED_S
            lane.last_tenant = tenant
        if tenant not in self._active:
            self._virtual[tenant] = max(self._floor(), self._virtual.get(tenant, 0.0))
        self._active[tenant] += 1
        if not lane.order and lane.running < self._room(ticket.lane, lane) and not self._at_cap(ticket):
            self._start(lane, ticket)
            return
        self._wait(lane, ticket)
        self._pump(ticket.lane, lane)

    def _room(self, key: Lane, lane: _Queues) -> int:
        """Return how many jobs of the lane may be with its worker now."""
        slots = self._slots(*key)
        if slots > 1 and lane.estimate_us > _SHORT_US and self._now_s() < lane.contended_until_s:
            return slots - 1
        return slots

    def _floor(self) -> float:
        """Return where a tenant that comes back starts: level with whoever is furthest behind, in any lane.

        The furthest ahead would not do: a flood of one lane would make those who join another wait for as long.
        """
        return min((self._virtual[tenant] for tenant in self._active), default=self._present)

    def _at_cap(self, ticket: Ticket) -> bool:
        return bool(ticket.share.concurrent) and self.running[ticket.tenant] >= ticket.share.concurrent

    def _check_time(self, lane: _Queues, ticket: Ticket, now_s: float) -> None:
        """Refuse what cannot be answered in time even if all goes well."""
        if ticket.deadline_s is None:
            return
        run_us, left_us = lane.least_us(now_s), (ticket.deadline_s - now_s) * 1e6
        own = len(lane.by_tenant.get(ticket.tenant, ()))
        # The tenant's own requests go first in any case; what of others' goes first depends on what still comes.
        needed_us = run_us * (1 + own / max(1, self._slots(*ticket.lane)))
        if needed_us > left_us:
            raise DeadlineExceededError(
                f"the answer would be too late: it takes about {needed_us / 1000:.0f} ms, "
                f"{max(0.0, left_us) / 1000:.0f} ms are left",
                fix="allow more time, or send fewer requests at once",
            )

    def _wait(self, lane: _Queues, ticket: Ticket) -> None:
        self.waiting[ticket.tenant] += 1
        self._serial += 1
        queue = lane.by_tenant.get(ticket.tenant)
        if queue is None:
            lane.by_tenant[ticket.tenant] = deque((ticket,))
            heapq.heappush(lane.order, (self._key(ticket), self._serial, ticket.tenant))
        else:
            queue.append(ticket)
        if ticket.deadline_s is not None:
            heapq.heappush(self._deadlines, (ticket.deadline_s, self._serial, ticket))
            if len(self._deadlines) > 2 * self.waiting.total() + _SLACK:
                # Tickets that started or were cancelled long before their deadline: they must not pile up here.
                self._deadlines = [entry for entry in self._deadlines if entry[2].state == Ticket.WAITING]
                heapq.heapify(self._deadlines)

    def _pump(self, key: Lane, lane: _Queues) -> None:
        while lane.order and lane.running < self._room(key, lane):
            ticket = self._next(lane)
            if ticket is not None:
                self._start(lane, ticket)

    def _next(self, lane: _Queues) -> Ticket | None:
        pushed_at, serial, tenant = heapq.heappop(lane.order)
        queue = lane.by_tenant[tenant]
        if not queue:  # all were cancelled
            del lane.by_tenant[tenant]
            return None
        if self._at_cap(queue[0]):
            lane.capped[tenant] = serial
            self._capped.setdefault(tenant, set()).add(queue[0].lane)
            return None
        now = self._key(queue[0])
        if now > pushed_at:  # it ran meanwhile, here or in another lane: it stands further back
            heapq.heappush(lane.order, (now, serial, tenant))
            return None
        ticket = queue.popleft()
        if queue:
            heapq.heappush(lane.order, (now, serial, tenant))
        else:
            del lane.by_tenant[tenant]
        self._leave_queue(ticket)
        now_s = self._now_s()
        if ticket.deadline_s is not None and ticket.deadline_s - lane.least_us(now_s) / 1e6 <= now_s:
            self._drop_late(ticket)
            return None
        return ticket

    def _key(self, ticket: Ticket) -> float:
        return self._virtual[ticket.tenant] - ticket.share.priority * _HEAD_START_US

    def _start(self, lane: _Queues, ticket: Ticket) -> None:
        ticket.state = Ticket.RUNNING
        ticket.charged_us = lane.estimate_us
        # A head start that nobody competes with costs nothing.
        alone = len(self._active) == 1
        self._present = max(self._present, self._virtual[ticket.tenant] if alone else self._key(ticket))
        self._virtual[ticket.tenant] += ticket.charged_us / ticket.share.weight
        lane.running += 1
        self.running[ticket.tenant] += 1
        ticket.start()

    def finished(self, ticket: Ticket, run_us: int, *, measured: bool = True) -> None:
        if ticket.state != Ticket.RUNNING:
            return
        ticket.state = Ticket.ENDED
        lane, tenant = self._lanes[ticket.lane], ticket.tenant
        lane.running -= 1
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]
        if run_us > 0:
            self._virtual[tenant] += (run_us - ticket.charged_us) / ticket.share.weight
            if measured:
                lane.learn(run_us, self._now_s())
        for key in self._capped.pop(tenant, ()):
            self._uncap(key, tenant)
        self._end(ticket)
        self._pump(ticket.lane, lane)

    def _uncap(self, key: Lane, tenant: str) -> None:
        """One of the tenant's requests ended: it may have a turn in the lane again."""
        lane = self._lanes.get(key)
        serial = lane.capped.pop(tenant, None) if lane is not None else None
        if lane is not None and serial is not None:
            queue = lane.by_tenant[tenant]
            if not queue:
                del lane.by_tenant[tenant]
                return
            heapq.heappush(lane.order, (self._key(queue[0]), serial, tenant))
            self._pump(key, lane)

    def cancel(self, ticket: Ticket) -> bool:
        if ticket.state != Ticket.WAITING:
            return False
        ticket.state = Ticket.ENDED
        self._lanes[ticket.lane].by_tenant[ticket.tenant].remove(ticket)
        self._leave_queue(ticket)
        self._end(ticket)
        return True

    def expire(self) -> None:
        now_s = self._now_s()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            ticket = heapq.heappop(self._deadlines)[2]
            if ticket.state == Ticket.WAITING:
                self._lanes[ticket.lane].by_tenant[ticket.tenant].remove(ticket)
                self._leave_queue(ticket)
                self._drop_late(ticket)

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant that is gone."""
        if not self._active[tenant]:
            del self._active[tenant]
            self._virtual.pop(tenant, None)
        for key in [key for key in self._lanes if key[0] == tenant]:
            lane = self._lanes[key]
            if not lane.running and not lane.by_tenant:
                del self._lanes[key]

    def _drop_late(self, ticket: Ticket) -> None:
        ticket.state = Ticket.ENDED
        self._end(ticket)
        ticket.drop(DeadlineExceededError("the deadline passed while the request waited for a worker"))

    def _leave_queue(self, ticket: Ticket) -> None:
        self.waiting[ticket.tenant] -= 1
        if not self.waiting[ticket.tenant]:
            del self.waiting[ticket.tenant]

    def _end(self, ticket: Ticket) -> None:
        self._active[ticket.tenant] -= 1
        if not self._active[ticket.tenant]:
            del self._active[ticket.tenant]
            # An idle tenant keeps what it overdrew, and nothing else: the table must not grow with every tenant seen.
            if self._virtual[ticket.tenant] <= self._floor():
                del self._virtual[ticket.tenant]
