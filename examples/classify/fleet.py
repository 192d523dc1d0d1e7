"""The microVMs of the demo: each runs function.py, gets photographs on its stdin and answers on its stdout."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from report import Answer, MicroVm, Photo

from remora.errors import RemoraError, UnavailableError
from remora.sandboxes.sandbox import Sandbox


@dataclass
class Worker:
    """A microVM at work, and what the live table shows of it."""

    vm: MicroVm
    state: str = "waiting"
    correct: int = 0
    sandbox: Sandbox | None = None
    answers: BinaryIO | None = None
    error: RemoraError | None = None
    times_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.times_ms) if self.times_ms else None

    def start(self, make: Callable[[], Sandbox], first: Photo, clock_s: float) -> None:
        """Start the microVM and have it classify one photograph.

        Args:
            make: boots or clones it.
            clock_s: when the demo's clock started (time.perf_counter).
        """
        self.state = "starting"
        begin_s = time.perf_counter()
        self.vm.start_s = begin_s - clock_s
        self.sandbox = make()
        assert self.sandbox.process.stdout is not None
        self.answers = self.sandbox.process.stdout.makefile("rb")
        self.classify(first, clock_s)
        self.vm.first_answer_ms = (time.perf_counter() - begin_s) * 1000
        self.state = "ready"

    def classify(self, photo: Photo, clock_s: float) -> None:
        """Send one photograph into the microVM and read the answer."""
        assert self.sandbox is not None
        assert self.answers is not None
        process = self.sandbox.process
        assert process.stdin is not None
        picture = photo.path.read_bytes()
        start_s = time.perf_counter() - clock_s
        process.stdin.sendall(f"{photo.name} {len(picture)}\n".encode() + picture)
        line = self.answers.readline()
        if not line:
            raise UnavailableError(f"the function in {self.vm.name} ended: {self._last_words()}")
        said = json.loads(line)
        labels = tuple((int(index), str(name), float(score)) for index, name, score in said["labels"])
        self.vm.answers.append(Answer(photo.name, labels, round(start_s, 4), said["ms"]))
        self.times_ms.append(said["ms"])
        self.correct += labels[0][0] == photo.true_index

    def classify_all(self, photos: Sequence[Photo], clock_s: float) -> None:
        self.state = "classifying"
        for photo in photos:
            self.classify(photo, clock_s)
        self.state = "done"

    def close(self) -> None:
        if self.answers is not None:
            self.answers.close()
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None

    def _last_words(self) -> str:
        assert self.sandbox is not None
        stderr = self.sandbox.process.stderr
        status = self.sandbox.process.wait(5)
        said = stderr.recv(4096).decode(errors="replace").strip() if stderr else ""
        return f"exit status {status}; {said[-500:]}"


def all_at_once(workers: Sequence[Worker], photos: Sequence[Photo], clock_s: float, tick: Callable[[], None]) -> None:
    """Have all microVMs classify at the same time; `tick` is called often meanwhile.

    Raises:
        RemoraError: what went wrong in the first microVM that failed.
    """

    def run(worker: Worker) -> None:
        try:
            worker.classify_all(photos, clock_s)
        except RemoraError as error:
            worker.error, worker.state = error, "failed"

    # Daemons: Ctrl-C must not wait for photographs.
    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        tick()
        threads[0].join(0.1)
    for worker in workers:
        if worker.error is not None:
            raise worker.error
