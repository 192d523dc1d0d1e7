"""Who goes next: one fair queue between tenants for every worker, in front of a bounded number of runs in flight.

Fairness is start-time fair queueing: each tenant has a virtual time that grows by the cost of what it ran, divided by
its weight, and the tenant that is furthest behind goes next, whichever model of the worker it asks for: device time is
what they share. A tenant that was idle starts at the present, so it cannot save up. The cost of a request is estimated
from what its model took before, and corrected by what it took.

A priority is a head start of bounded length: a tenant may be ahead of its share by that much device time before it
waits like everyone else. So it makes answers early and starves nobody.

Who is next takes others along: requests of the same form for the same model, in the order of their own turns, as many
as the model's plan allows. They are one run, and each is charged its part. While tenants compete a batch may take
longer than a lone run only as far as it spares them as many turns, and nothing waits inside the worker: a run there
would be ahead of whoever comes next.

No sockets, no workers: `start` and `drop` of a ticket do whatever running and refusing means.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from remora.agent.lanes import Entry, Queues, WorkerLanes
from remora.agent.tickets import Lane, Ticket, Turn, queue_full
from remora.errors import DeadlineExceededError

#: Head start of one step of priority.
_HEAD_START_US = 50_000.0
#: How many tenants who cannot join are looked at for company.
_LOOK_AHEAD = 64
#: Deadlines of tickets that wait no more, beyond which the list is cleaned.
_SLACK = 1000


class Scheduler(Protocol):
    """The contract that the agent's core relies on."""

    #: Starts several tickets as one run; without it each runs by itself.
    together: Callable[[list[Ticket]], None] | None

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket, or start it at once.

        Raises:
            ResourceExhaustedError: the tenant's queue is full.
            DeadlineExceededError: it would be too late.
        """

    def finished(self, ticket: Ticket, run_us: int, *, measured: bool = True) -> None:
        """The ticket's job ended; its part of the run was `run_us`. Not `measured`: charged, but nothing learnt."""

    def cancel(self, ticket: Ticket) -> bool:
        """Take a waiting ticket out of the queue without calling it. False if it waits no more."""

    def expire(self) -> None:
        """Drop the tickets whose deadline is over."""


class FairScheduler:
    """See the module's docstring and `Scheduler`."""

    def __init__(
        self,
        slots: Callable[[str], int],
        now_s: Callable[[], float],
        queue_length_per_tenant: int,
        call_later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._slots = slots
        self._now_s = now_s
        self._queue_length = queue_length_per_tenant
        self._call_later = call_later
        #: Starts several tickets as one run; without it each runs by itself.
        self.together: Callable[[list[Ticket]], None] | None = None
        #: Called when nothing of a lane waits or runs any more.
        self.on_idle: Callable[[Lane], None] = lambda _lane: None
        self._workers: dict[str, WorkerLanes] = {}
        self._virtual: dict[str, float] = {}
        self._present = 0.0
        #: Tickets of each tenant that are with a worker, and that wait.
        self.running: Counter[str] = Counter()
        self._capped: dict[str, set[Lane]] = {}  # tenant -> lanes in which it waits for its own requests
        self._active: Counter[str] = Counter()  # tickets waiting or running
        self.waiting: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._serial = 0

    # -- coming -------------------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        tenant, share, now_s = ticket.tenant, ticket.share, self._now_s()
        worker, lane = self._lane(ticket.lane)
        if self.waiting.get(tenant, 0) >= (share.queue or self._queue_length):
            raise queue_full(share, self._queue_length, lane.times.estimate_us / 1e6)
        self._check_time(lane, ticket, now_s)
        lane.plan = ticket.plan
        ticket.since_s = now_s
        worker.came(tenant, now_s)
        active = self._active.get(tenant, 0)  # not [tenant]: a Counter asks a function for what it does not have
        if not active:
            self._virtual[tenant] = max(self._floor(), self._virtual.get(tenant, 0.0))
        self._active[tenant] = active + 1
        worker.active[tenant] = worker.active.get(tenant, 0) + 1
        lane.count += 1
        free = not worker.order and not lane.held and worker.running < self._room(worker)
        if free and not lane.full and not self._at_cap(ticket) and not self._holds(worker, lane, ticket, ticket.rows):
            worker.running += 1
            lane.running += 1
            self._charge(lane, ticket)
            self._start([ticket])
            return
        self._wait(worker, lane, ticket)
        self._pump(worker)

    def charge(self, tenant: str, used_us: int, weight: float) -> None:
        """Charge a tenant for what it used without a ticket: the time that a model of its own took to load."""
        self._virtual[tenant] = max(self._floor(), self._virtual.get(tenant, 0.0)) + used_us / weight

    def _lane(self, key: Lane) -> tuple[WorkerLanes, Queues]:
        worker = self._workers.get(key[0])
        if worker is None:
            worker = self._workers[key[0]] = WorkerLanes(key[0])
        return worker, worker.lane(key[1])

    def seed(self, key: Lane, curve: Mapping[int, float]) -> None:
        """Tell what runs of a model are known to take: rows -> microseconds."""
        self._lane(key)[1].times.seed(curve)

    def _room(self, worker: WorkerLanes) -> int:
        return worker.room(self._slots(worker.domain), self._now_s())

    def _floor(self) -> float:
        """Return where a tenant that comes back starts: level with whoever is furthest behind, in any worker.

        The furthest ahead would not do: a flood of one worker would make those who join another wait for as long. What
        runs is charged already; nobody starts behind that, or a flood would always have one more turn first.
        """
        if not self._active:
            return self._present
        return min(self._present, min(map(self._virtual.__getitem__, self._active)))

    def _at_cap(self, ticket: Ticket) -> bool:
        return bool(ticket.share.concurrent) and self.running[ticket.tenant] >= ticket.share.concurrent

    def _holds(self, worker: WorkerLanes, lane: Queues, ticket: Ticket, waiting_rows: int) -> bool:
        """True if the ticket waits for company; then it is looked at again when it has waited long enough."""
        if not lane.plan.wait_s or self._call_later is None:
            return False
        if not worker.wants_company(lane, ticket, waiting_rows, self._now_s()):
            return False
        ticket.held_s = ticket.held_s or self._now_s()

        def look_again() -> None:
            worker.release(lane)
            self._pump(worker)

        self._call_later(max(0.0, ticket.since_s + lane.plan.wait_s - self._now_s()), look_again)
        return True

    def _check_time(self, lane: Queues, ticket: Ticket, now_s: float) -> None:
        """Refuse what cannot be answered in time even if all goes well."""
        if ticket.deadline_s is None:
            return
        run_us, left_us = lane.times.least_us(now_s), (ticket.deadline_s - now_s) * 1e6
        waiting, needed_us = lane.by_tenant.get(ticket.tenant), run_us
        if waiting:
            # The tenant's own requests go first in any case; what of others' goes first depends on what still comes.
            own = len(waiting) / max(1, ticket.plan.rows)
            needed_us *= 1 + own / max(1, self._slots(ticket.lane[0]))
        if needed_us > left_us:
            raise DeadlineExceededError(
                f"the answer would be too late: it takes about {needed_us / 1000:.0f} ms, "
                f"{max(0.0, left_us) / 1000:.0f} ms are left",
                fix="allow more time, or send fewer requests at once",
            )

    def _wait(self, worker: WorkerLanes, lane: Queues, ticket: Ticket) -> None:
        self.waiting[ticket.tenant] += 1
        lane.waiting_rows += ticket.rows
        self._serial += 1
        queue = lane.by_tenant.get(ticket.tenant)
        if queue is None:
            lane.by_tenant[ticket.tenant] = deque((ticket,))
            heapq.heappush(worker.order, (self._key(ticket), self._serial, ticket.tenant, lane))
        else:
            queue.append(ticket)
        if lane.held and not lane.full:
            worker.release(lane)  # this one may be the company that they wait for
        if ticket.deadline_s is not None:
            heapq.heappush(self._deadlines, (ticket.deadline_s, self._serial, ticket))
            if len(self._deadlines) > 2 * self.waiting.total() + _SLACK:
                # Tickets that started or were cancelled long before their deadline: they must not pile up here.
                self._deadlines = [entry for entry in self._deadlines if entry[2].state == Ticket.WAITING]
                heapq.heapify(self._deadlines)

    # -- taking turns -------------------------------------------------------------------------------------------------

    def _pump(self, worker: WorkerLanes) -> None:
        while worker.order and worker.running < self._room(worker):
            entry = heapq.heappop(worker.order)
            lane = entry[3]
            ticket = self._head(worker, entry)
            if ticket is None:
                continue
            if lane.full or self._holds(worker, lane, ticket, lane.waiting_rows):
                lane.held.append(entry)
                continue
            worker.running += 1
            lane.running += 1
            self._draw(worker, lane, entry, ticket)
            self._start(self._company(worker, lane, ticket))

    def _head(self, worker: WorkerLanes, entry: Entry) -> Ticket | None:
        """Return the ticket whose turn an entry is, or None if it has none, or stands further back by now."""
        pushed_at, serial, tenant, lane = entry
        queue = lane.by_tenant[tenant]
        if not queue:  # all were cancelled
            del lane.by_tenant[tenant]
            return None
        ticket = queue[0]
        if self._at_cap(ticket):
            lane.capped[tenant] = serial
            self._capped.setdefault(tenant, set()).add(lane.key)
            return None
        now = self._key(ticket)
        if now > pushed_at:  # it ran meanwhile, here or in another lane
            heapq.heappush(worker.order, (now, serial, tenant, lane))
            return None
        now_s = self._now_s()
        if ticket.deadline_s is not None and ticket.deadline_s - lane.times.least_us(now_s) / 1e6 <= now_s:
            heapq.heappush(worker.order, entry)
            self._leave_queue(lane, queue.popleft())
            self._drop_late(ticket)
            return None
        return ticket

    def _draw(self, worker: WorkerLanes, lane: Queues, entry: Entry, ticket: Ticket) -> None:
        """Take the ticket out of its queue and charge it; its tenant's next one stands behind the other lanes'."""
        queue = lane.by_tenant[ticket.tenant]
        queue.popleft()
        self._leave_queue(lane, ticket)
        self._charge(lane, ticket)
        if queue:
            self._serial += 1
            heapq.heappush(worker.order, (self._key(queue[0]), self._serial, ticket.tenant, lane))
        else:
            del lane.by_tenant[ticket.tenant]

    def _company(self, worker: WorkerLanes, lane: Queues, first: Ticket) -> list[Ticket]:
        """Return the ticket and those that run with it, drawn in the order of their turns."""
        tickets, rows = [first], first.rows
        if first.form is None or self.together is None:
            return tickets
        slots, now_s = self._slots(worker.domain), self._now_s()
        # A pair gains a few hundredths: nobody else waits longer for that.
        most = lane.plan.rows if worker.contended(now_s) else lane.plan.most_rows(lane.waiting_rows, slots)
        if most <= rows:
            return tickets
        limit = worker.stretch(slots, now_s) * lane.plan.stretch_of(rows)
        latest_s = first.deadline_s
        aside: list[Entry] = []
        while worker.order and rows < most and len(aside) < _LOOK_AHEAD:
            entry = heapq.heappop(worker.order)
            if entry[3] is not lane:
                aside.append(entry)
                continue
            ticket = self._head(worker, entry)
            if ticket is None:
                continue
            together = rows + ticket.rows
            ends_s = self._now_s() + lane.times.of_rows_us(together) / 1e6
            deadlines = [one for one in (latest_s, ticket.deadline_s) if one is not None]
            fits = together <= most and lane.plan.stretch_of(together) <= limit
            if ticket.form != first.form or not fits or (deadlines and ends_s > min(deadlines)):
                aside.append(entry)
                continue
            self._draw(worker, lane, entry, ticket)
            tickets.append(ticket)
            rows, latest_s = together, min(deadlines, default=None)
        for entry in aside:
            heapq.heappush(worker.order, entry)
        return tickets

    def _key(self, ticket: Ticket) -> float:
        return self._virtual[ticket.tenant] - ticket.share.priority * _HEAD_START_US

    def _charge(self, lane: Queues, ticket: Ticket) -> None:
        ticket.state = Ticket.RUNNING
        ticket.charged_us = lane.times.share_us
        # A head start that nobody competes with costs nothing.
        alone = len(self._active) == 1
        self._present = max(self._present, self._virtual[ticket.tenant] if alone else self._key(ticket))
        self._virtual[ticket.tenant] += ticket.charged_us / ticket.share.weight
        self.running[ticket.tenant] = self.running.get(ticket.tenant, 0) + 1

    def _start(self, tickets: list[Ticket]) -> None:
        turn = Turn(len(tickets), sum([ticket.rows for ticket in tickets]))
        for ticket in tickets:
            ticket.turn = turn
        if len(tickets) > 1 and self.together is not None:
            self.together(tickets)
        else:
            tickets[0].start()

    # -- ending -------------------------------------------------------------------------------------------------------

    def finished(self, ticket: Ticket, run_us: int, *, measured: bool = True) -> None:
        turn = ticket.turn
        if ticket.state != Ticket.RUNNING or turn is None:
            return
        ticket.state = Ticket.ENDED
        worker, lane = self._lane(ticket.lane)
        tenant = ticket.tenant
        turn.left -= 1
        turn.run_us += run_us
        turn.learn = turn.learn and measured
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]
        if run_us > 0:
            self._virtual[tenant] += (run_us - ticket.charged_us) / ticket.share.weight
        if not turn.left:
            worker.turn_ended(lane, turn, self._now_s())
        for key in self._capped.pop(tenant, ()):
            self._uncap(key, tenant)
        self._end(ticket)
        self._pump(worker)
        if not lane.count:
            self.on_idle(lane.key)

    def _uncap(self, key: Lane, tenant: str) -> None:
        """One of the tenant's requests ended: it may have a turn in the lane again."""
        worker, lane = self._lane(key)
        serial = lane.capped.pop(tenant, None)
        if serial is not None:
            queue = lane.by_tenant[tenant]
            if not queue:
                del lane.by_tenant[tenant]
                return
            heapq.heappush(worker.order, (self._key(queue[0]), serial, tenant, lane))
            self._pump(worker)

    def cancel(self, ticket: Ticket) -> bool:
        if ticket.state != Ticket.WAITING:
            return False
        self._take_out(ticket)
        ticket.state = Ticket.ENDED
        self._end(ticket)
        return True

    def expire(self) -> None:
        now_s = self._now_s()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            ticket = heapq.heappop(self._deadlines)[2]
            if ticket.state == Ticket.WAITING:
                self._take_out(ticket)
                self._drop_late(ticket)

    def busy(self, key: Lane) -> bool:
        """True if anything of the lane waits or runs."""
        worker = self._workers.get(key[0])
        lane = worker.lanes.get(key[1]) if worker is not None else None
        return lane is not None and lane.count > 0

    def forget(self, tenant: str) -> None:
        """Drop what is remembered of a tenant that is gone."""
        if not self._active[tenant]:
            del self._active[tenant]
            self._virtual.pop(tenant, None)
        worker = self._workers.get(tenant)
        if worker is not None and not worker.active:
            del self._workers[tenant]

    def _take_out(self, ticket: Ticket) -> None:
        lane = self._lane(ticket.lane)[1]
        lane.by_tenant[ticket.tenant].remove(ticket)
        self._leave_queue(lane, ticket)

    def _drop_late(self, ticket: Ticket) -> None:
        ticket.state = Ticket.ENDED
        self._end(ticket)
        ticket.drop(DeadlineExceededError("the deadline passed while the request waited for a worker"))

    def _leave_queue(self, lane: Queues, ticket: Ticket) -> None:
        lane.waiting_rows -= ticket.rows
        self.waiting[ticket.tenant] -= 1
        if not self.waiting[ticket.tenant]:
            del self.waiting[ticket.tenant]

    def _end(self, ticket: Ticket) -> None:
        tenant = ticket.tenant
        worker, lane = self._lane(ticket.lane)
        lane.count -= 1
        worker.active[tenant] -= 1
        if not worker.active[tenant]:
            del worker.active[tenant]
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            # An idle tenant keeps what it overdrew, and nothing else: the table must not grow with every tenant seen.
            if self._virtual[tenant] <= self._floor():
                del self._virtual[tenant]
