"""Who goes next: a fair queue between tenants for every model, in front of a bounded number of jobs in flight.

Fairness is start-time fair queueing: each tenant has a virtual time that grows by the cost of what it ran, and the
tenant that is furthest behind goes next. A tenant that was idle starts at the present, so it cannot save up. The cost
of a job is estimated from the time its model took before, and corrected by the time it took.

No sockets, no workers: `start` and `drop` of a ticket do whatever running and refusing means.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from remora.errors import DeadlineExceededError, RemoraError, ResourceExhaustedError

#: (trust domain, model).
Lane = tuple[str, str]
#: What a job of a model that never ran is expected to cost.
_FIRST_GUESS_US = 1000.0
#: Weight of the newest measurement in the estimate.
_SMOOTHING = 0.2
#: Deadlines of tickets that wait no more, beyond which the list is cleaned.
_SLACK = 1000


class Ticket:
    """A request that waits for its turn."""

    __slots__ = ("charged_us", "deadline_s", "drop", "lane", "start", "state", "tenant")

    WAITING, RUNNING, ENDED = range(3)

    def __init__(
        self,
        tenant: str,
        lane: Lane,
        start: Callable[[], None],
        drop: Callable[[RemoraError], None],
        deadline_s: float | None = None,
    ) -> None:
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
        """

    def finished(self, ticket: Ticket, run_us: int) -> None:
        """The ticket's job ended; the next may start."""

    def cancel(self, ticket: Ticket) -> bool:
        """Take a waiting ticket out of the queue without calling it. False if it waits no more."""

    def expire(self) -> None:
        """Drop the tickets whose deadline is over."""


class _Queues:
    """The waiting tickets of one lane."""

    __slots__ = ("by_tenant", "estimate_us", "order", "running")

    def __init__(self) -> None:
        self.by_tenant: dict[str, deque[Ticket]] = {}
        #: (virtual time when it was pushed, serial, tenant): one entry for each tenant that waits.
        self.order: list[tuple[float, int, str]] = []
        self.running = 0
        self.estimate_us = _FIRST_GUESS_US


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
        self._active: Counter[str] = Counter()  # tickets waiting or running
        self.waiting: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._serial = 0

    def submit(self, ticket: Ticket) -> None:
        tenant = ticket.tenant
        if self.waiting[tenant] >= self._queue_length:
            raise ResourceExhaustedError(
                f"{self._queue_length} requests of this tenant wait already (limits.queue_length_per_tenant)",
                fix="send fewer at a time, or ask the operator to raise it",
            )
        if not self._active[tenant]:
            self._virtual[tenant] = max(self._present, self._virtual.get(tenant, 0.0))
        self._active[tenant] += 1
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            lane = self._lanes[ticket.lane] = _Queues()
        if not lane.order and lane.running < self._slots(*ticket.lane):
            self._start(lane, ticket)
            return
        self._wait(lane, ticket)
        self._pump(ticket.lane, lane)

    def _wait(self, lane: _Queues, ticket: Ticket) -> None:
        self.waiting[ticket.tenant] += 1
        self._serial += 1
        queue = lane.by_tenant.get(ticket.tenant)
        if queue is None:
            lane.by_tenant[ticket.tenant] = deque((ticket,))
            heapq.heappush(lane.order, (self._virtual[ticket.tenant], self._serial, ticket.tenant))
        else:
            queue.append(ticket)
        if ticket.deadline_s is not None:
            heapq.heappush(self._deadlines, (ticket.deadline_s, self._serial, ticket))
            if len(self._deadlines) > 2 * self.waiting.total() + _SLACK:
                # Tickets that started or were cancelled long before their deadline: they must not pile up here.
                self._deadlines = [entry for entry in self._deadlines if entry[2].state == Ticket.WAITING]
                heapq.heapify(self._deadlines)

    def _pump(self, key: Lane, lane: _Queues) -> None:
        while lane.order and lane.running < self._slots(*key):
            ticket = self._next(lane)
            if ticket is not None:
                self._start(lane, ticket)

    def _next(self, lane: _Queues) -> Ticket | None:
        pushed_at, serial, tenant = heapq.heappop(lane.order)
        queue = lane.by_tenant[tenant]
        if not queue:  # all were cancelled
            del lane.by_tenant[tenant]
            return None
        now = self._virtual[tenant]
        if now > pushed_at:  # it ran meanwhile, here or in another lane: it stands further back
            heapq.heappush(lane.order, (now, serial, tenant))
            return None
        ticket = queue.popleft()
        if queue:
            heapq.heappush(lane.order, (now, serial, tenant))
        else:
            del lane.by_tenant[tenant]
        self._leave_queue(ticket)
        if ticket.deadline_s is not None and ticket.deadline_s <= self._now_s():
            self._drop_late(ticket)
            return None
        return ticket

    def _start(self, lane: _Queues, ticket: Ticket) -> None:
        ticket.state = Ticket.RUNNING
        ticket.charged_us = lane.estimate_us
        self._present = max(self._present, self._virtual[ticket.tenant])
        self._virtual[ticket.tenant] += ticket.charged_us
        lane.running += 1
        ticket.start()

    def finished(self, ticket: Ticket, run_us: int) -> None:
        if ticket.state != Ticket.RUNNING:
            return
        ticket.state = Ticket.ENDED
        lane = self._lanes[ticket.lane]
        lane.running -= 1
        if run_us > 0:
            self._virtual[ticket.tenant] += run_us - ticket.charged_us
            lane.estimate_us += _SMOOTHING * (run_us - lane.estimate_us)
        self._end(ticket)
        self._pump(ticket.lane, lane)

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
            if self._virtual[ticket.tenant] <= self._present:
                del self._virtual[ticket.tenant]
