"""Several jobs of one form as one run of their model: inputs one after the other along the first axis, outputs apart.

The inputs are copied together into memory of this process alone, as tensors of several tenants must be; from then on
nobody's arena is read, and a member that is given up is answered at once while the others go on. Only the last one left
stops the run. A run that fails says nothing of whose fault it was: each member then runs by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from remora.backends.contract import Array, LoadedModel, Stop
from remora.errors import RemoraError
from remora.workers.arena import ALIGN, aligned
from remora.workers.protocol import Message

#: Inputs that are larger in all get memory of their own, which goes with the run.
_MOST_KEPT_BYTES = 64 << 20
_kept = threading.local()


def join(requests: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the inputs of several requests, one after the other along the first axis.

    They lie in memory that the thread's next call uses again: fresh pages took three times as long as the copy.
    """
    names = list(requests[0])
    sizes = [aligned(sum([one[name].nbytes for one in requests])) for name in names]
    memory, start, joined = _memory(sum(sizes)), 0, {}
    for name, size in zip(names, sizes, strict=True):
        parts = [one[name] for one in requests]
        shape = (sum([part.shape[0] for part in parts]), *parts[0].shape[1:])
        into = memory[start : start + sum([part.nbytes for part in parts])].view(parts[0].dtype).reshape(shape)
        joined[name] = np.concatenate(parts, out=into)
        start += size
    return joined


def _memory(size_bytes: int) -> Array:
    kept: Array | None = getattr(_kept, "memory", None)
    if kept is None or len(kept) < size_bytes:
        room: Array = np.empty(size_bytes + ALIGN, np.uint8)
        kept = room[-room.ctypes.data % ALIGN :]
        _kept.memory = kept if size_bytes <= _MOST_KEPT_BYTES else None
    return kept


class Member:
    """One job of a joined run."""

    __slots__ = ("answer", "feeds", "gone", "job", "rows", "stop", "wanted")

    def __init__(
        self,
        job: Message,
        feeds: Mapping[str, Array],
        wanted: Sequence[str],
        stop: Stop,
        answer: Callable[[Sequence[Array]], Message],
    ) -> None:
        """
        Args:
            answer: Makes the job's answer of its part of the outputs.
        """
        self.job = job
        self.feeds = feeds
        self.wanted = wanted
        self.stop = stop
        self.answer = answer
        sizes = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
        #: Size of the first axis; 0 if its inputs have none in common.
        self.rows = sizes.pop() if len(sizes) == 1 else 0
        #: Its answer is made, or it was answered because it was given up.
        self.gone = False

    @property
    def form(self) -> tuple[object, ...]:
        """What jobs must have in common."""
        inputs = tuple((name, array.dtype.str, array.shape[1:]) for name, array in self.feeds.items())
        return self.job["t"], self.job["m"], tuple(self.wanted), inputs


class JoinedRun:
    """Runs members together; `let_go` is told of each that leaves early, from whichever thread stops it."""

    def __init__(self, members: Sequence[Member], let_go: Callable[[Member], None]) -> None:
        self.rows = sum(one.rows for one in members)
        self._members = members
        self._let_go = let_go
        self._lock = threading.Lock()
        self._stop = Stop()
        self._running = False

    def run(self, model: LoadedModel) -> list[tuple[Member, list[Array]]]:
        """Return the outputs of each member that is still there, as parts of the run's; nothing if it did not work."""
        first = self._members[0]
        if any(one.form != first.form or not one.rows for one in self._members):
            return []
        try:
            feeds = join([one.feeds for one in self._members])
            self._running = True
            for one in self._members:
                one.stop.attach(partial(self._left, one))
            computed = model.run(feeds, first.wanted, self._stop)
        except (RemoraError, MemoryError):
            return []
        if any(not array.ndim or array.shape[0] != self.rows for array in computed):
            return []
        parts, start = [], 0
        for one in self._members:
            end = start + one.rows
            if self._claim(one):
                parts.append((one, [array[start:end] for array in computed]))
            start = end
        return parts

    def remaining(self) -> list[Member]:
        """Return who has no answer yet, and from now on is stopped only by its own run."""
        with self._lock:
            self._running = False
            return [one for one in self._members if not one.gone]

    def _claim(self, one: Member) -> bool:
        """Take a member out of the reach of `_left`; False if it has gone."""
        with self._lock:
            gone, one.gone = one.gone, True
            return not gone

    def _left(self, one: Member) -> None:
        with self._lock:
            if one.gone or not self._running:
                return
            last = sum(not other.gone for other in self._members) == 1
            one.gone = not last
        if last:
            self._stop.request()  # it is answered when the model lets go, or its worker is killed
        else:
            self._let_go(one)
