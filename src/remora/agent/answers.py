"""Requests that may be sent again: each is run once, and its answer is remembered for a while.

A client whose connection broke does not know whether its request was run. It sends it again under the same key; here
it either joins the request that still runs, or gets the answer that is remembered. Memory is bounded by count and by
bytes for each tenant; large answers stay in the tenant's own shared memory, and are given up first when that is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from remora.agent.policy import Limits
from remora.errors import InvalidArgumentError, RemoraError
from remora.workers.contract import Result

#: Session id and idempotency key.
Key = tuple[str, int]
#: What two requests under one key must have in common: operation, model, bytes of input.
Fingerprint = tuple[str, str, int]
#: What an answer costs beyond its tensors.
OVERHEAD_BYTES = 512


class Answer:
    """A result with an owner count: its memory goes back when nobody sends or remembers it any more."""

    __slots__ = ("_users", "queue_us", "result", "size_bytes")

    def __init__(self, result: Result, queue_us: int) -> None:
        self.result = result
        self.queue_us = queue_us
        self.size_bytes = sum([len(tensor.data) for tensor in result.outputs]) + OVERHEAD_BYTES
        self._users = 1

    def take(self) -> Answer:
        self._users += 1
        return self

    def drop(self) -> None:
        """Give one use back."""
        self._users -= 1
        if self._users == 0:
            self.result.release()


#: Gets an answer that it must `drop`, or an error.
Waiter = Callable[[Answer | RemoraError], None]


class Flight:
    """One request under way, and everyone who waits for it."""

    __slots__ = ("fingerprint", "key", "waiters")

    def __init__(self, key: Key, fingerprint: Fingerprint) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.waiters: list[Waiter] = []


class Answers:
    """Flights and remembered answers of all sessions."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._flights: dict[Key, Flight] = {}
        self._remembered: dict[str, OrderedDict[Key, tuple[Fingerprint, Answer]]] = {}  # by tenant, oldest first
        self._bytes: dict[str, int] = {}

    def look_up(self, tenant: str, key: Key, fingerprint: Fingerprint) -> Answer | Flight | None:
        """Return the remembered answer (taken), the flight to join, or None for a request seen for the first time.

        Raises:
            InvalidArgumentError: the key was used for another request.
        """
        flight = self._flights.get(key)
        if flight is not None:
            self._check(key, flight.fingerprint, fingerprint)
            return flight
        remembered = self._remembered.get(tenant)
        entry = remembered.get(key) if remembered is not None else None
        if entry is None:
            return None
        self._check(key, entry[0], fingerprint)
        return entry[1].take()

    @staticmethod
    def _check(key: Key, known: Fingerprint, asked: Fingerprint) -> None:
        if known != asked:
            raise InvalidArgumentError(
                f"request_id {key[1]} was used before, for {known[0]} on {known[1]}",
                fix="use a new request_id for every request, and the same one only to send it again",
            )

    def begin(self, key: Key, fingerprint: Fingerprint) -> Flight:
        flight = self._flights[key] = Flight(key, fingerprint)
        return flight

    def end(self, tenant: str, flight: Flight, answer: Answer | None) -> None:
        """The request was answered (remember it) or failed (forget it: it may be run again)."""
        self._flights.pop(flight.key, None)
        if (
            answer is None
            or answer.result.region is not None
            or answer.size_bytes > self._limits.answer_bytes_per_tenant
        ):
            return
        remembered = self._remembered.setdefault(tenant, OrderedDict())
        remembered[flight.key] = (flight.fingerprint, answer.take())
        self._bytes[tenant] = self._bytes.get(tenant, 0) + answer.size_bytes
        while (
            len(remembered) > self._limits.answers_per_tenant
            or self._bytes[tenant] > self._limits.answer_bytes_per_tenant
        ):
            self._forget(tenant, next(iter(remembered)))

    def _forget(self, tenant: str, key: Key) -> None:
        _fingerprint, answer = self._remembered[tenant].pop(key)
        self._bytes[tenant] -= answer.size_bytes
        answer.drop()
        if not self._remembered[tenant]:
            del self._remembered[tenant]
            del self._bytes[tenant]

    def forget_session(self, tenant: str, session_id: str) -> None:
        for key in [key for key in self._remembered.get(tenant, ()) if key[0] == session_id]:
            self._forget(tenant, key)

    def forget_tenant(self, tenant: str) -> bool:
        """Give all the tenant's remembered memory back; False if there was none."""
        keys = list(self._remembered.get(tenant, ()))
        for key in keys:
            self._forget(tenant, key)
        return bool(keys)
