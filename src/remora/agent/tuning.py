"""How each model is run on its device: how many rows at once, for how long one waits for company, how many runs.

A model is measured on samples by its worker, beside its work, when it first falls idle after it was loaded; the result
is kept, so that this happens once for a model, a device and a version of what runs it. An operator's word in the
manifest goes first. Until something is known, requests run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from remora.agent.notebook import Facts, Notebook
from remora.agent.operations import INFER, Operation
from remora.agent.tickets import ALONE, Lane, Plan
from remora.errors import CancelledError, NotFoundError, RemoraError
from remora.workers.contract import SHARED, Measurement, ModelSource, ModelSpec, Workers
from remora.workers.settings import WorkerSettings

#: Rows of a run that are chosen at most; an operator may say more.
MOST_ROWS = 64
#: A batch must bring this much more throughput than lone runs: a CPU gains 5 to 10 %, which longer runs do not repay.
_WORTH = 1.15
#: While many wait, runs of this many rows: few enough that one more of them delays nobody much.
_PAIR = 2
#: A pair saves the agent and the worker one of two turns, which on a CPU take the model's own time: measured, 2 to 8 %
#: of all processor time for EfficientNet-Lite0. So it need not be quicker by itself, only not slower, as far as that
#: can be measured; and its run must be long beside the copies that join it.
_NO_SLOWER = 0.97
_LONG_RUN_US = 2000
#: The smallest size is chosen that comes so near to the best.
_NEAR = 0.9
#: Threads that together do less than this part of what one does alone are in each other's way. Far from 1, because one
#: slot too few halves what a model can do, and one too many costs little.
_HINDERED = 0.8
#: A model that is never idle is measured after this long all the same.
_PATIENCE_S = 5.0
#: A tenant's own models are measured one at a time, and for this share of the time at most: whoever uploads one model
#: after the other must not have the node measure for ever.
_SHARE = 0.1


def form_of(operation: Operation) -> tuple[Hashable, int]:
    """Return what requests must have in common to run as one, and how many rows this one has.

    None: it runs by itself, because it is no inference or its inputs have no first axis in common.
    A picture is one row, whatever its size: the model's manifest makes the same of each.
    """
    if operation.image is not None:
        return operation.name, 1
    rows = {tensor.shape[0] if tensor.shape else 0 for tensor in operation.inputs}
    if operation.name != INFER or len(rows) != 1 or 0 in rows:
        return None, 1
    inputs = tuple((tensor.name, tensor.dtype, tensor.shape[1:]) for tensor in operation.inputs)
    return (operation.outputs, inputs), rows.pop()


def takes_rows(spec: ModelSpec) -> bool:
    """True if the first axis of every input and output is open: the form of a model that takes any number of rows."""
    tensors = (*spec.inputs, *spec.outputs)
    return bool(tensors) and all(tensor.shape and tensor.shape[0] == -1 for tensor in tensors)


def choose(found: Measurement, device: str, threads: int) -> Plan:
    """Return how a model should be run, by what was measured of it."""
    rows = 1
    speed = {size: size / run_us for size, run_us in found.curve.items() if run_us > 0}
    if found.independent and 1 in speed:
        best = max(speed.values())
        if best >= _WORTH * speed[1]:
            rows = min(size for size, per_us in speed.items() if per_us >= _NEAR * best)
    backlog = 1
    if rows == 1 and device == "cpu" and found.independent and found.curve.get(1, 0.0) >= _LONG_RUN_US:
        backlog = _PAIR if speed.get(_PAIR, 0.0) >= _NO_SLOWER * speed[1] else 1
    concurrent, rates = 0, found.threads
    if rates and device == "cpu":
        # An idle thread costs nothing: fewer only where both were measured, and several are in each other's way.
        concurrent = 1 if rates.get(threads, rates.get(1, 0.0)) < _HINDERED * rates.get(1, 0.0) else 0
    elif rates:
        least = min(count for count, rate in rates.items() if rate >= 0.95 * max(rates.values()))
        concurrent = least if least < threads else 0
    return Plan(min(rows, MOST_ROWS), concurrent=concurrent, stretch=_stretch(found), backlog=backlog)


def _stretch(found: Measurement) -> tuple[tuple[int, float], ...]:
    one_us = found.curve.get(1, 0.0)
    return tuple((rows, run_us / one_us) for rows, run_us in sorted(found.curve.items())) if one_us else ()


@dataclass
class _Unmeasured:
    source: ModelSource
    spec: ModelSpec
    key: str
    since_s: float
    load_s: float
    #: One row of each input, as it was last asked for.
    shapes: Sequence[Sequence[int]] | None
    asked: bool = False


class Tuning:
    """The plans of loaded models. `seed` tells the scheduler what runs of a model take."""

    def __init__(
        self,
        workers: Workers,
        notebook: Notebook,
        settings: WorkerSettings,
        now_s: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._notebook = notebook
        self._settings = settings
        self._now_s = now_s
        self.seed: Callable[[Lane, Mapping[int, float]], None] = lambda _lane, _curve: None
        #: Called with what a model took after it was measured.
        self.on_memory: Callable[[Lane, int], None] = lambda _lane, _bytes: None
        self._plans: dict[Lane, Plan] = {}
        self._unmeasured: dict[Lane, _Unmeasured] = {}
        self._rests: dict[str, float] = {}  # tenant -> when a model of its own may be measured again

    def plan(self, lane: Lane, operation: Operation) -> Plan:
        """Return how a request for a loaded model is run."""
        waiting = self._unmeasured.get(lane)
        if waiting is not None and waiting.shapes is None:
            waiting.shapes = _shapes(waiting.spec, operation)
        return self._plans.get(lane, ALONE)

    def loaded(self, lane: Lane, source: ModelSource, spec: ModelSpec, load_s: float) -> None:
        """A model is loaded: decide how it is run, or have it measured soon."""
        each, threads = source.run_threads(self._settings.threads), self._settings.threads
        key = f"{source.digest} {spec.device} {spec.backend} {threads} threads{f', {each} a run' if each > 1 else ''}"
        facts = self._notebook.get(lane[0], key, kept=lane[0] == SHARED)
        self._adopt(lane, spec, source, facts.measurement if facts is not None else None)
        if (facts is None or not facts.tried) and self._settings.calibrate_ms and spec.inputs:
            one = [(1, *tensor.shape[1:]) if takes_rows(spec) else tensor.shape for tensor in spec.inputs]
            shapes = one if all(min(shape, default=0) >= 0 for shape in one) else None
            self._unmeasured[lane] = _Unmeasured(source, spec, key, self._now_s(), load_s, shapes)
        if facts is None:
            self._note(lane, key, Facts(source.digest, None, False, spec.memory_bytes, load_s))

    def memory_bytes(self, lane: Lane, digest: str) -> int:
        """Return what a model is known to take; 0 if it was never loaded."""
        return self._notebook.memory_bytes(lane[0], digest, kept=lane[0] == SHARED)

    def idle(self, lane: Lane) -> None:
        """Nothing runs or waits in a lane: a good moment to measure its model."""
        waiting = self._unmeasured.get(lane)
        rests = self._now_s() < self._rests.get(lane[0], 0.0)
        if waiting is not None and waiting.shapes is not None and not waiting.asked and not rests:
            self._measure(lane, waiting)

    def sweep(self) -> None:
        """Measure what was never idle."""
        for lane, waiting in list(self._unmeasured.items()):
            if self._now_s() - waiting.since_s > _PATIENCE_S:
                self.idle(lane)

    def forget(self, lane: Lane) -> None:
        self._plans.pop(lane, None)
        self._unmeasured.pop(lane, None)

    def forget_domain(self, domain: str) -> None:
        self._notebook.forget(domain)
        self._rests.pop(domain, None)

    def _measure(self, lane: Lane, waiting: _Unmeasured) -> None:
        waiting.asked = True
        most = MOST_ROWS if takes_rows(waiting.spec) else 1
        if lane[0] != SHARED:
            self._rests[lane[0]] = self._now_s() + self._settings.calibrate_ms / 1000 / _SHARE

        def measured(outcome: Measurement | RemoraError) -> None:
            if self._unmeasured.get(lane) is not waiting:
                return  # unloaded meanwhile, perhaps loaded again
            del self._unmeasured[lane]
            found = outcome if isinstance(outcome, Measurement) else None
            memory_bytes = waiting.spec.memory_bytes
            if found is not None and waiting.spec.device == "cpu":
                memory_bytes = max(memory_bytes, found.memory_bytes)
                self.on_memory(lane, memory_bytes)
            self._adopt(lane, waiting.spec, waiting.source, found)
            tried = not isinstance(outcome, CancelledError | NotFoundError)
            self._note(lane, waiting.key, Facts(waiting.source.digest, found, tried, memory_bytes, waiting.load_s))

        self._workers.measure(*lane, waiting.shapes or (), most, measured)

    def _note(self, lane: Lane, key: str, facts: Facts) -> None:
        self._notebook.put(lane[0], key, facts, kept=lane[0] == SHARED)

    def _adopt(self, lane: Lane, spec: ModelSpec, source: ModelSource, found: Measurement | None) -> None:
        said: Mapping[str, float] = source.manifest.get("batching", {})
        plan = choose(found, spec.device, self._settings.threads) if found is not None else ALONE
        each = source.run_threads(self._settings.threads)
        if each > 1 and spec.device == "cpu":  # as many at once as there is room for, whatever gains a little more
            plan = replace(plan, concurrent=self._settings.threads // each)
        if found is not None:
            self.seed(lane, found.curve)
        rows = int(said.get("rows", plan.rows)) if takes_rows(spec) else 1
        backlog = plan.backlog if takes_rows(spec) and "rows" not in said else 1
        wait_s, concurrent = float(said.get("wait_ms", 0.0)) / 1000, int(said.get("concurrent", plan.concurrent))
        self._plans[lane] = Plan(rows, wait_s, concurrent, plan.stretch, backlog)


def _shapes(spec: ModelSpec, operation: Operation) -> Sequence[Sequence[int]] | None:
    """Return one row of each input as a request gives them; None if it does not."""
    given = {tensor.name: tensor.shape for tensor in operation.inputs}
    if operation.name != INFER or any(not given.get(tensor.name) for tensor in spec.inputs):
        return None
    if takes_rows(spec):
        return [(1, *given[tensor.name][1:]) for tensor in spec.inputs]
    return [given[tensor.name] for tensor in spec.inputs]
