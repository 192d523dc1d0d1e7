"""Which models stay in the memory of a device: loaded when asked for, kept by use, put out when another needs room.

A budget per device bounds what models take by measurement. What runs or has requests waiting is never put out. If only
busy models are left to make room, the one that is worth least takes no new requests until it has answered those it has,
and then goes; the new requests wait until it is back. So no client sees an error, and nobody waits forever.

Loads that wait take turns by tenant, so that nobody waits behind all the models of somebody else.

Worth is what loading it again would cost, for the memory it takes and the time since it was used: of two models that
are loaded equally fast, the larger and longer unused goes first.

Values and callbacks only: no workers, no files.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from remora.agent.hints import with_retry
from remora.agent.tickets import Lane
from remora.errors import CancelledError, RemoraError, ResourceExhaustedError

#: How long a load waits for a model to fall idle before a busy one has to take its leave.
_PATIENCE_S = 0.25
#: A model that was loaded is not sent away busy before it had this long.
_STAY_S = 1.0
#: A load that finds no room for so long fails.
_MOST_WAIT_S = 30.0
#: Models of one tenant, or of the catalogue, that are loaded at the same time.
_AT_ONCE = 4
#: Without a measured time, loading is taken to need this much.
_LOAD_S = 0.1
RULE = "workers.device_memory_bytes"


@dataclass
class _Resident:
    device: str
    size_bytes: int
    load_s: float
    since_s: float
    used_s: float


@dataclass(frozen=True)
class _Load:
    key: Lane
    device: str
    size_bytes: int
    start: Callable[[], None]
    fail: Callable[[RemoraError], None]
    since_s: float


class Residency:
    """`busy` tells whether anything of a model runs or waits; `evict` unloads it."""

    def __init__(
        self,
        budget_bytes: Callable[[str], int],
        now_s: Callable[[], float],
        busy: Callable[[Lane], bool],
        evict: Callable[[Lane], None],
    ) -> None:
        self._budget_bytes = budget_bytes
        self._now_s = now_s
        self._busy = busy
        self._evict = evict
        self._models: dict[Lane, _Resident] = {}
        self._loading: dict[Lane, _Load] = {}
        self._waiting: deque[_Load] = deque()
        self._leaving: set[Lane] = set()
        #: When a tenant, while any waits, last had a turn.
        self._turns: dict[str, int] = {}

    def used_bytes(self) -> Mapping[str, int]:
        """Return what models take, by device."""
        used: dict[str, int] = {}
        for one in self._models.values():
            used[one.device] = used.get(one.device, 0) + one.size_bytes
        return used

    def leaving(self, key: Lane) -> bool:
        """True if the model takes no new requests."""
        return key in self._leaving

    def used(self, key: Lane) -> None:
        one = self._models.get(key)
        if one is not None:
            one.used_s = self._now_s()

    # -- coming -------------------------------------------------------------------------------------------------------

    def admit(
        self, key: Lane, device: str, size_bytes: int, start: Callable[[], None], fail: Callable[[RemoraError], None]
    ) -> None:
        """Call `start` once there is room for a model that is expected to take so much; `fail` if that cannot be.

        Raises:
            ResourceExhaustedError: the model is larger than the budget.
        """
        self._check(key, device, size_bytes)
        self._waiting.append(_Load(key, device, size_bytes, start, fail, self._now_s()))
        self._advance()

    def expected_bytes(self, device: str, file_bytes: int) -> int:
        """Return what to reserve for a model that was never loaded: twice its file, if the budget is not less."""
        budget = self._budget_bytes(device)
        return max(file_bytes, min(2 * file_bytes, budget or 2 * file_bytes))

    def _check(self, key: Lane, device: str, size_bytes: int) -> None:
        budget = self._budget_bytes(device)
        if budget and size_bytes > budget:
            raise ResourceExhaustedError(
                f"model {key[1]} takes {size_bytes} bytes, models may take {budget} on {device} ({RULE})",
                fix="use a smaller model, or ask the operator to raise it",
            )

    def loaded(self, key: Lane, device: str, size_bytes: int, load_s: float) -> None:
        """A load ended well; the model is measured now.

        Raises:
            ResourceExhaustedError: it is larger than the budget, and must be unloaded.
        """
        self._loading.pop(key, None)
        self._check(key, device, size_bytes)
        now_s = self._now_s()
        self._leaving.discard(key)
        self._models[key] = _Resident(device, size_bytes, max(load_s, 0.001), now_s, now_s)

    def failed(self, key: Lane) -> None:
        self._loading.pop(key, None)
        self._advance()

    def grown(self, key: Lane, size_bytes: int) -> None:
        """The model was measured again, after it ran."""
        one = self._models.get(key)
        if one is not None:
            one.size_bytes = max(one.size_bytes, size_bytes)

    # -- going --------------------------------------------------------------------------------------------------------

    def idle(self, key: Lane) -> None:
        """Nothing of a model runs or waits any more."""
        if key in self._leaving:
            self._put_out(key)
        if self._waiting:
            self._advance()

    def forget(self, keys: Iterable[Lane]) -> None:
        """These models are gone, for reasons of their own."""
        gone = set(keys)
        for key in gone:
            self._models.pop(key, None)
            self._loading.pop(key, None)
            self._leaving.discard(key)
        waiting, self._waiting = self._waiting, deque()
        for load in waiting:
            if load.key in gone:
                load.fail(CancelledError(f"model {load.key[1]} is not wanted any more"))
            else:
                self._waiting.append(load)
        self._advance()

    def trim(self) -> None:
        """Come back under the budget where a model turned out larger than expected, as far as others are idle.

        Then begin what waits.
        """
        for device in {one.device for one in self._models.values()}:
            self._make_room(device, 0, partly=True)
        self._advance()

    def sweep(self) -> None:
        """See to models that grew, and to loads that wait for long."""
        self.trim()
        now_s = self._now_s()
        for load in [load for load in self._waiting if now_s - load.since_s > _MOST_WAIT_S]:
            self._waiting.remove(load)
            full = ResourceExhaustedError(f"there was no room for model {load.key[1]} on {load.device} ({RULE})")
            load.fail(with_retry(full, 1.0))
        self._advance()
        first = self._first()
        if first is not None and now_s - first.since_s > _PATIENCE_S:
            self._ask_to_leave(first)

    def _advance(self) -> None:
        while (load := self._first()) is not None and self._make_room(load.device, load.size_bytes):
            self._waiting.remove(load)
            self._turns[load.key[0]] = 1 + max(self._turns.values(), default=0)
            if not self._waiting:
                self._turns.clear()
            self._loading[load.key] = load
            load.start()

    def _first(self) -> _Load | None:
        """Return the next load: the oldest of the tenant whose last turn is longest ago."""
        under_way = Counter(domain for domain, _model in self._loading)
        free = [load for load in self._waiting if under_way[load.key[0]] < _AT_ONCE]
        return min(free, key=lambda load: self._turns.get(load.key[0], 0), default=None)

    def _free_bytes(self, device: str) -> int:
        budget = self._budget_bytes(device)
        if not budget:
            return 1 << 62
        taken = sum(one.size_bytes for one in self._models.values() if one.device == device)
        return budget - taken - sum(load.size_bytes for load in self._loading.values() if load.device == device)

    def _make_room(self, device: str, size_bytes: int, *, partly: bool = False) -> bool:
        """Put out idle models until so much is free; none if that is not enough, unless `partly`."""
        free = self._free_bytes(device)
        victims = []
        for key in self._least_worth_first(device):
            if free >= size_bytes:
                break
            if not self._busy(key):
                victims.append(key)
                free += self._models[key].size_bytes
        if free < size_bytes and not partly:
            return False
        for key in victims:
            self._put_out(key)
        return True

    def _ask_to_leave(self, load: _Load) -> None:
        free, now_s = self._free_bytes(load.device), self._now_s()
        for key in self._least_worth_first(load.device):
            if free >= load.size_bytes:
                return
            if now_s - self._models[key].since_s >= _STAY_S:
                self._leaving.add(key)
                free += self._models[key].size_bytes

    def _least_worth_first(self, device: str) -> list[Lane]:
        now_s = self._now_s()

        def waste(key: Lane) -> float:
            one = self._models[key]
            return (now_s - one.used_s + _LOAD_S) * one.size_bytes / one.load_s

        return sorted((key for key, one in self._models.items() if one.device == device), key=waste, reverse=True)

    def _put_out(self, key: Lane) -> None:
        self._models.pop(key, None)
        self._leaving.discard(key)
        self._evict(key)
