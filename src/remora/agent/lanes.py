"""What waits in front of one worker: a lane for each of its models, and one order of tenants over all of them."""

from __future__ import annotations

import heapq
from collections import Counter, deque

from remora.agent.runtimes import RunTimes
from remora.agent.tickets import ALONE, Lane, Ticket, Turn

#: Weight of the newest run in what is typical for a worker.
_SMOOTHING = 0.2
#: Tenants compete in a worker for this long after two of them last took turns.
_CONTENDED_S = 1.0
#: Below this a run that waits inside the worker delays nobody noticeably, and saves a turn of the agent's loop.
_SHORT_US = 1000.0
#: How much longer than a lone run a batch of two competing tenants may take. Whoever sends one request at a time meets
#: half a batch on its way and is part of the next: 0.5 and 1 times 1.5 stays within 2.5.
_STRETCH = 1.5


class Queues:
    """The tickets of one lane."""

    __slots__ = ("by_tenant", "capped", "count", "held", "key", "plan", "running", "times", "waiting_rows")

    def __init__(self, key: Lane) -> None:
        self.key = key
        self.by_tenant: dict[str, deque[Ticket]] = {}
        #: Tenants that wait for one of their own requests to end, with the serial of their entry.
        self.capped: dict[str, int] = {}
        #: Entries taken out of the order until a run of this lane ends, or company comes.
        self.held: list[Entry] = []
        self.plan = ALONE
        self.running = 0
        #: Tickets that wait or run.
        self.count = 0
        self.waiting_rows = 0
        self.times = RunTimes()

    @property
    def full(self) -> bool:
        return bool(self.plan.concurrent) and self.running >= self.plan.concurrent


#: (virtual time when it was pushed, serial, tenant, lane): one for each tenant that waits in a lane.
Entry = tuple[float, int, str, Queues]


class WorkerLanes:
    """One trust domain's worker: its lanes, and what they share."""

    __slots__ = ("_contended_until_s", "_last_tenant", "_typical_us", "active", "domain", "lanes", "order", "running")

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.lanes: dict[str, Queues] = {}
        self.order: list[Entry] = []
        self.running = 0
        #: Tenants with tickets that wait or run.
        self.active: Counter[str] = Counter()
        self._contended_until_s = 0.0
        self._last_tenant = ""
        self._typical_us = 0.0

    def lane(self, model: str) -> Queues:
        found = self.lanes.get(model)
        if found is None:
            found = self.lanes[model] = Queues((self.domain, model))
        return found

    def came(self, tenant: str, now_s: float) -> None:
        """Note that a tenant has a request."""
        if self._last_tenant != tenant:
            if self._last_tenant:
                self._contended_until_s = now_s + _CONTENDED_S
            self._last_tenant = tenant

    def contended(self, now_s: float) -> bool:
        return now_s < self._contended_until_s

    def room(self, slots: int, now_s: float) -> int:
        """Return how many runs may be with the worker now, of `slots` at most."""
        return slots - 1 if slots > 1 and self._typical_us > _SHORT_US and self.contended(now_s) else slots

    def stretch(self, slots: int, now_s: float) -> float:
        """Return how many times as long as a lone run a batch may take, for the sake of those who wait for its end."""
        if not self.contended(now_s):
            return float("inf")
        return max(_STRETCH, len(self.active) / max(1, slots - 1))

    def wants_company(self, lane: Queues, ticket: Ticket, waiting_rows: int, now_s: float) -> bool:
        """True if the request should wait a little: the worker is busy anyway, and others may join it."""
        plan = lane.plan
        if not plan.wait_s or ticket.form is None or not self.running:
            return False
        return waiting_rows < plan.rows and now_s - ticket.since_s < plan.wait_s

    def release(self, lane: Queues) -> None:
        """Put the lane's held entries back into the order."""
        held, lane.held = lane.held, []
        for entry in held:
            heapq.heappush(self.order, entry)

    def turn_ended(self, lane: Queues, turn: Turn, now_s: float) -> None:
        lane.running -= 1
        self.running -= 1
        if turn.learn and turn.run_us > 0:
            lane.times.learn(turn.run_us, turn.rows, turn.requests, now_s)
            self._typical_us += (_SMOOTHING if self._typical_us else 1.0) * (turn.run_us - self._typical_us)
        for one in self.lanes.values() if not self.running else (lane,):
            if one.held:
                self.release(one)
