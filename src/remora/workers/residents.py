"""The models of one worker: which should be there, which are, what they turned out to be, and who waits to hear of it.

This outlives the process: a new one is told to load what the old one had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from remora.errors import AbortedError, CancelledError, NotFoundError, RemoraError
from remora.reactor import Reactor
from remora.workers.contract import LIBRARY, Measurement, ModelSource, ModelSpec
from remora.workers.process import WorkerProcess, memory_bytes
from remora.workers.protocol import Message, error_of, measurement_of, specs_of, text, whole
from remora.workers.settings import WorkerSettings

LoadDone = Callable[[ModelSpec | RemoraError], None]
MeasureDone = Callable[[Measurement | RemoraError], None]


@dataclass
class Resident:
    source: ModelSource
    spec: ModelSpec | None = None  # what it turned out to be, also while a new worker loads it again
    state: str = "wanted"  # wanted -> loading -> loaded
    number: int = 0  # of the load, in this worker's protocol
    deaths: int = 0
    waiters: list[LoadDone] = field(default_factory=list)
    measured: MeasureDone | None = None
    #: Memory of the worker when the load began, and what the model added to it.
    base_bytes: int = 0
    grown_bytes: int = 0


class Residents:
    """Loads, unloads and measures. `given_up` is told of a model that is not to come, `changed` of one that came."""

    def __init__(
        self,
        reactor: Reactor,
        settings: WorkerSettings,
        given_up: Callable[[str, RemoraError], None],
        changed: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._given_up = given_up
        self._changed = changed
        self._models: dict[str, Resident] = {}
        self._numbers = count(1)
        self._process: WorkerProcess | None = None

    def __bool__(self) -> bool:
        return bool(self._models)

    def get(self, key: str) -> Resident | None:
        return self._models.get(key)

    def names(self) -> tuple[str, ...]:
        return tuple(key for key, model in self._models.items() if model.state == "loaded")

    def device(self) -> str:
        devices = {model.spec.device for model in self._models.values() if model.spec is not None}
        return ",".join(sorted(devices)) or "none"

    def clear(self) -> None:
        self._models.clear()

    # -- loading ------------------------------------------------------------------------------------------------------

    def want(self, source: ModelSource, done: LoadDone) -> None:
        """Have a model loaded, or answer at once if it is."""
        model = self._models.get(source.key)
        if model is not None and model.source.digest != source.digest:
            self.unload(source.key)
            model = None
        if model is None:
            model = self._models[source.key] = Resident(source)
        if model.state == "loaded" and model.spec is not None:
            spec = model.spec
            self._reactor.call_soon(lambda: done(spec))
            return
        model.waiters.append(done)
        self._changed()

    def unload(self, key: str) -> None:
        model = self._models.pop(key, None)
        if model is None:
            return
        if self._process is not None and model.state != "wanted":
            self._process.tell({"t": "unload", "m": model.number})
        gone = CancelledError(f"model {key} was unloaded while it was loading")
        self._answer_measure(model, gone)
        self._give_up(model, gone)

    def send_wanted(self, process: WorkerProcess) -> None:
        """Tell a worker to load what it does not have yet."""
        self._process = process
        for model in [model for model in self._models.values() if model.state == "wanted"]:
            self._send_load(process, model)

    def _send_load(self, process: WorkerProcess, model: Resident) -> None:
        source = model.source
        if source.format == LIBRARY:
            model.state = "loading"
            model.number = next(self._numbers)
            digests = [*(digest for digest, _path in source.needs), source.digest]
            process.tell({"t": "load", "m": model.number, "key": source.key, "format": LIBRARY, "digests": digests})
            # Its own code runs while it is loaded (constructors), and may never come back.
            self._reactor.call_later(self._settings.start_s, lambda: self._end_load(process, model))
            return
        try:
            fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            problem = NotFoundError(f"the file of model {source.key} cannot be opened: {error.strerror}")
            self._give_up(model, problem)
            return
        model.state = "loading"
        model.number = next(self._numbers)
        model.base_bytes, model.grown_bytes = memory_bytes(process.pid), 0
        manifest = {key: value for key, value in source.manifest.items() if key not in ("labels", "batching")}
        classes = len(source.manifest.get("labels", ()))  # their names stay here
        message: Message = {"t": "load", "m": model.number, "key": source.key, "format": source.format}
        message["digest"] = source.digest
        message["threads"] = source.run_threads(self._settings.threads)
        process.tell({**message, "task": source.task, "manifest": manifest, "classes": classes}, fd)

    def _end_load(self, process: WorkerProcess, model: Resident) -> None:
        if self._process is process and model.state == "loading":
            process.kill("its library was not loaded in time")

    def loaded(self, message: Message) -> None:
        """Take in the worker's answer to a load."""
        model = self._by_number(message)
        if model is None or model.state != "loading":
            return
        if message["t"] == "refused":
            self._give_up(model, error_of(message.get("error")))
            return
        device = text(message.get("device"), "device")
        reported = whole(message.get("mem"), "memory size", 1 << 50)
        model.grown_bytes = max(reported, self._growth(model))
        model.spec = ModelSpec(
            key=model.source.key,
            task=model.source.task,
            inputs=specs_of(message.get("inputs")),
            outputs=specs_of(message.get("outputs")),
            device=device,
            # What a model takes on another device the worker's own memory does not show.
            memory_bytes=model.grown_bytes if device == "cpu" else reported,
            backend=text(message.get("by", ""), "backend"),
        )
        model.state = "loaded"
        self._answer_load(model, model.spec)
        self._changed()

    def _by_number(self, message: Message) -> Resident | None:
        """Return the model that a message of the worker is about; None if it was unloaded meanwhile."""
        number = whole(message.get("m"), "model", 1 << 62)
        return next((model for model in self._models.values() if model.number == number), None)

    def _growth(self, model: Resident) -> int:
        """Return what the worker has grown by since the model's load began, without what later loads account for."""
        now = memory_bytes(self._process.pid) if self._process is not None else 0
        later = sum(other.grown_bytes for other in self._models.values() if other.number > model.number)
        return max(0, now - model.base_bytes - later)

    def _answer_load(self, model: Resident, outcome: ModelSpec | RemoraError) -> None:
        waiters, model.waiters = model.waiters, []
        for done in waiters:
            self._reactor.call_soon(partial(done, outcome))

    def _give_up(self, model: Resident, error: RemoraError) -> None:
        """Forget a model, and answer whoever waits for it."""
        self._models.pop(model.source.key, None)
        self._answer_load(model, error)
        self._given_up(model.source.key, error)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, key: str, shapes: Sequence[Sequence[int]], most_rows: int, done: MeasureDone) -> None:
        model = self._models.get(key)
        if model is None or model.state != "loaded" or model.measured is not None or self._process is None:
            problem = NotFoundError(f"model {key} is not there to be measured")
            self._reactor.call_soon(lambda: done(problem))
            return
        model.measured = done
        sizes = [list(shape) for shape in shapes]
        budget_ms = self._settings.calibrate_ms
        self._process.tell({"t": "measure", "m": model.number, "shapes": sizes, "most": most_rows, "ms": budget_ms})

    def measured(self, message: Message) -> None:
        """Take in the worker's answer to `measure`."""
        model = self._by_number(message)
        if model is None:
            return
        if "error" in message:
            self._answer_measure(model, error_of(message["error"]))
        else:
            self._answer_measure(model, measurement_of(message, self._growth(model)))

    def _answer_measure(self, model: Resident, outcome: Measurement | RemoraError) -> None:
        done, model.measured = model.measured, None
        if done is not None:
            self._reactor.call_soon(partial(done, outcome))

    # -- ends ---------------------------------------------------------------------------------------------------------

    def died(self, reason: str) -> None:
        """The worker died: all is wanted again, except what kills workers while they load it."""
        self._process = None
        for model in list(self._models.values()):
            self._answer_measure(model, AbortedError(f"the worker died while it measured the model: {reason}"))
            # A model that was loaded before is not what kills workers while they start again: it is not given up.
            if model.state == "loading" and (model.spec is None or model.source.format == LIBRARY):
                model.deaths += 1
            model.state = "wanted"
            if model.source.format == LIBRARY and model.deaths:
                self._give_up(model, AbortedError(f"the library's worker died while it loaded it: {reason}"))
            elif model.deaths >= 2:
                self._give_up(model, AbortedError(f"two workers died while they loaded this model: {reason}"))

    def fail_waiters(self, error: RemoraError) -> None:
        """Give up what nobody has seen loaded yet."""
        for model in list(self._models.values()):
            self._answer_measure(model, error)
            if model.waiters:
                self._give_up(model, error)
