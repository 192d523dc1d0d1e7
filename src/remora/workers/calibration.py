"""Measures, inside a worker, how a model likes to be run: time by rows, and runs a second by threads.

Also whether rows are rows: a model whose first axis is open may still mix along it (a mean, a sequence), and joining
requests of such a model would answer each with something of the others. So the outputs of two inputs together are
compared with those of each alone, and nothing is joined unless they are the same.

Bounded in time: by a stop request when the budget is spent. Bounded in memory: sizes end when they gain nothing more,
because a runtime keeps the memory of its largest run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from remora.backends.contract import Array, LoadedModel, Spec, Stop
from remora.errors import InvalidArgumentError, RemoraError
from remora.workers.joining import join

SIZES = (1, 2, 4, 8, 16, 32, 64)
#: A size must bring this much more throughput than the best before, or it counts as a miss; after two the search ends.
_GAIN = 1.1
_MISSES = 2
#: Share of the budget for sizes; the rest is for threads.
_FOR_SIZES = 0.7
#: Runs of each size, of which the quickest counts.
_ROUNDS = 5
#: Short runs are repeated in a round for about this long, so often at most: the first ones find cold caches.
_LEAST_S = 0.005
_MOST_REPEATS = 50
#: Windows of one and of several threads, of which the best counts.
_WINDOWS = 4
#: A window says nothing of the model if this process had less of the processors than this part: others had them.
_LEAST_HAD = 0.8
_MOST_BYTES = 64 << 20


class Budget:
    """A stop that requests itself when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.stop = Stop()
        self._end_s = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self.stop.request)
        self._timer.daemon = True
        self._timer.start()

    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def close(self) -> None:
        self._timer.cancel()


def samples(specs: Sequence[Spec], rows: int, seed: int = 1) -> dict[str, Array]:
    """Return `rows` times the given shapes, of values that hardly any model refuses: 0 to 1; whole ones are 0 or 1."""
    random = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape = (rows * spec.shape[0], *spec.shape[1:]) if spec.shape else ()
        dtype = np.dtype(spec.dtype)
        values = random.random(shape, np.float32) if dtype.kind == "f" else random.integers(0, 2, shape)
        feeds[spec.name] = values.astype(dtype)
    return feeds


def rows_are_rows(model: LoadedModel, specs: Sequence[Spec], wanted: Sequence[str], stop: Stop) -> bool:
    """True if the outputs of three rows are those of one and of two, put together."""
    one, two = samples(specs, 1), samples(specs, 2, seed=2)
    both = {name: np.concatenate([one[name], two[name]]) for name in one}
    apart = [model.run(feeds, wanted, stop) for feeds in (one, two)]
    together = model.run(both, wanted, stop)
    for first, second, joined in zip(*apart, together, strict=True):
        if not joined.ndim or not first.ndim or joined.shape[0] != 3 or first.shape[0] != 1 or second.shape[0] != 2:
            return False
        expected = np.concatenate([first, second])
        if expected.dtype.kind != "f":
            if not np.array_equal(expected, joined):
                return False
        else:
            scale = float(np.abs(expected).max(initial=0.0))
            if not np.allclose(expected, joined, rtol=1e-2, atol=1e-3 * scale, equal_nan=True):
                return False
    return True


def curve(
    model: LoadedModel, specs: Sequence[Spec], wanted: Sequence[str], budget: Budget, most: int
) -> dict[int, int]:
    """Return rows -> microseconds of the quickest run, for as many sizes as gain and fit into the budget.

    In rounds over all sizes, as others use this machine, too: what disturbs one round disturbs every size alike.
    """
    one, quickest = samples(specs, 1), dict[int, float]()
    reserve_s = budget.left_s() * (1 - _FOR_SIZES)
    sizes = list(SIZES)
    for _ in range(_ROUNDS):
        best, misses = 0.0, 0
        for rows in list(sizes):
            expected_s = quickest.get(rows) or 2 * quickest.get(rows // 2, 0.0)
            if (rows > 1 or quickest) and budget.left_s() - reserve_s < expected_s:
                return _whole_us(quickest)
            if rows > most or misses >= _MISSES or rows * sum(array.nbytes for array in one.values()) > _MOST_BYTES:
                sizes = sizes[: sizes.index(rows)]
                break
            repeats = max(1, min(_MOST_REPEATS, int(_LEAST_S / expected_s))) if expected_s else 1
            took_s = min([_timed(model, one, wanted, budget.stop, rows) for _ in range(repeats)])
            quickest[rows] = min(took_s, quickest.get(rows, took_s))
            misses = 0 if rows / took_s >= best * _GAIN else misses + 1
            best = max(best, rows / took_s)
    return _whole_us(quickest)


def _whole_us(times_s: Mapping[int, float]) -> dict[int, int]:
    return {rows: max(1, int(took_s * 1e6)) for rows, took_s in times_s.items()}


def by_threads(
    model: LoadedModel, specs: Sequence[Spec], wanted: Sequence[str], budget: Budget, threads: int
) -> dict[int, float]:
    """Return threads -> runs a second, for one and for all of them; nothing unless both are known.

    In turn, and the best of several: others only ever take time away, from one and from several threads alike.
    """
    feeds = samples(specs, 1)
    counts = (1, threads) if threads > 1 else ()
    found: dict[int, float] = {}
    window_s = budget.left_s() / (_WINDOWS * max(1, len(counts)))
    for _ in range(_WINDOWS):
        for count in counts:
            rate, processors = _rate(lambda: _timed(model, feeds, wanted, budget.stop), count, window_s)
            if model.device != "cpu" or processors >= _LEAST_HAD * min(count, _processors()):
                found[count] = max(found.get(count, 0.0), rate)
    return found if all(found.get(count) for count in counts) else {}


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _rate(run: Callable[[], object], threads: int, seconds: float) -> tuple[float, float]:
    """Return runs a second, 0.0 if a thread did not end even one, and how many processors this process had."""
    counts = [0] * threads
    began_s, used_s = time.monotonic(), time.process_time()

    def repeat(number: int) -> None:
        try:
            while time.monotonic() - began_s < seconds:
                run()
                counts[number] += 1
        except RemoraError:
            pass  # the budget is spent: what was counted counts

    others = [threading.Thread(target=repeat, args=(number,), daemon=True) for number in range(1, threads)]
    for other in others:
        other.start()
    repeat(0)
    for other in others:
        other.join()
    took_s = time.monotonic() - began_s
    return sum(counts) / took_s if all(counts) else 0.0, (time.process_time() - used_s) / took_s


def _timed(model: LoadedModel, one: Mapping[str, Array], wanted: Sequence[str], stop: Stop, times: int = 1) -> float:
    """Return how long a run of one request takes, or of several that are joined: with the copies which that takes.

    On a CPU it is what this thread computed, not what it waited for: a run that others interrupt, also requests in
    threads of this very process, would look like a long one. Backends compute in the thread that calls them, or at
    least with it.
    """
    began_s, used_s = time.perf_counter(), time.thread_time()
    feeds = join([one] * times) if times > 1 else one
    computed = model.run(feeds, wanted, stop)
    if times > 1:
        _apart = [array.copy() for array in computed]
    took_s = time.perf_counter() - began_s
    return min(took_s, time.thread_time() - used_s) if model.device == "cpu" else took_s


def calibrate(
    model: LoadedModel, shapes: Sequence[Sequence[int]], threads: int, most: int, budget_s: float
) -> dict[str, object]:
    """Measure a model.

    Args:
        shapes: One row of each input, in the model's order.
        most: Most rows of a run.

    Returns:
        `curve` [[rows, us], ...], `threads` [[threads, runs a second], ...], and `rows`: whether rows are independent.

    Raises:
        RemoraError: the model does not run on samples.
    """
    if not all(spec.dtype for spec in model.inputs):
        raise InvalidArgumentError(
            "the model's file does not say what it takes, so nothing can be made up to measure it"
        )
    specs = [Spec(spec.name, spec.dtype, tuple(shape)) for spec, shape in zip(model.inputs, shapes, strict=True)]
    budget = Budget(budget_s)
    try:
        wanted = model.check(samples(specs, 1), ())
        independent = most > 1 and rows_are_rows(model, specs, wanted, budget.stop)
        times = curve(model, specs, wanted, budget, most if independent else 1)
        rates = by_threads(model, specs, wanted, budget, threads) if budget.left_s() > 0 else {}
    finally:
        budget.close()
    return {"curve": list(times.items()), "threads": list(rates.items()), "rows": independent}
