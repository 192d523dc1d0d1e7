"""Computes jobs: what a datagram names becomes arrays in memory that is shared, and those become an answer.

Whatever goes wrong with one job is its answer. Called from all job threads at once; the dicts are the main thread's to
change (`workers.main`), and are only read here.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from remora.backends import linalg
from remora.backends.contract import Array, Limits, LoadedModel, Spec, Stop
from remora.errors import CancelledError, InternalError, InvalidArgumentError, RemoraError, ResourceExhaustedError
from remora.workers.contract import MAPS, PICTURES
from remora.workers.joining import JoinedRun, Member
from remora.workers.layout import Layout
from remora.workers.protocol import Message, encode, error_parts

if TYPE_CHECKING:  # imported where they are needed: pictures cost 40 ms of a start
    from remora.backends.vision.pictures import Window
    from remora.backends.vision.tasks import Finder, Mapper, PictureTask

#: Outputs at least this large are computed straight into the arena; below, binding costs more than the copy.
_BIND_BYTES = 64 * 1024
_MOST_PLANS = 256


class Runner:
    """Runs jobs on `models` (by number: the model, its task, and what does that task) with memory of `arenas`."""

    def __init__(self, send: Callable[[bytes], object], limits: Limits) -> None:
        """
        Args:
            send: Sends on the job socket what cannot wait for the answer.
        """
        self.arenas: dict[int, mmap.mmap] = {}
        self.models: dict[int, tuple[LoadedModel, str, PictureTask | None]] = {}
        self._send = send
        self._limits = limits
        self._plans: dict[tuple[object, ...], tuple[tuple[str, ...], Layout | None]] = {}
        self._needs: dict[int, tuple[threading.Event, list[int]]] = {}

    def grant(self, message: Message) -> None:
        """Take in the agent's answer to a job that needs a larger block."""
        event, place = self._needs.pop(message["id"], (None, []))
        if event is not None:
            place[:] = [message["b"], message["off"], message["len"]]
            event.set()

    def run(self, job: Message, stop: Stop) -> Message:
        started = time.perf_counter_ns()
        answer = self._guarded(job["id"], lambda: self._compute(job, stop))
        answer["us"] = (time.perf_counter_ns() - started) // 1000
        return answer

    def run_together(self, jobs: Sequence[Message], stops: Sequence[Stop]) -> list[Message]:
        """Answer jobs that came as one: in one run if that works, else each by itself."""
        started = time.perf_counter_ns()
        answers: list[Message] = []
        members, alone = [], []
        for job, stop in zip(jobs, stops, strict=True):
            try:
                members.append(self._member(job, stop))
            except (
                RemoraError,
                KeyError,
                ValueError,
                MemoryError,
            ):  # what is wrong with it shows when it runs by itself
                alone.append((job, stop))
        run = JoinedRun(members, self._let_go)
        for one, arrays in run.run(self.model(jobs[0])) if len(members) > 1 else ():
            answers.append(self._guarded(one.job["id"], partial(one.answer, arrays)))
            answers[-1]["rows"] = one.rows
        alone += [(one.job, one.stop) for one in run.remaining()]
        joined_us = (time.perf_counter_ns() - started) // 1000
        for answer in answers:
            answer.update({"us": joined_us * answer.pop("rows") // run.rows, "all": joined_us})
        for job, stop in alone:
            answer = self.run(job, stop)
            answer["us"] += joined_us // len(jobs)
            answers.append(answer)
        return answers

    def _member(self, job: Message, stop: Stop) -> Member:
        """Return a job as a member of a joined run, with its inputs checked, or its picture decoded."""
        model = self.model(job)
        if job["t"] == "infer":
            feeds = self._feeds(job)
            wanted, _layout = self._plan(job, model, feeds)
            return Member(job, feeds, wanted, stop, partial(self._part, job, wanted))
        task = self._task(job)
        feeds, window = task.feeds(self._picture(job), self._limits)
        wanted = model.check(feeds, (task.output,))
        return Member(job, feeds, wanted, stop, lambda answer: self._seen(job, task, answer[0], window))

    def _let_go(self, one: Member) -> None:
        """Answer a member that was given up, without waiting for the others."""
        error = CancelledError("the job was stopped while it ran with others")
        self._send(encode({"t": "failed", "id": one.job["id"], "error": error_parts(error), "us": 0}))

    def _part(self, job: Message, wanted: Sequence[str], arrays: Sequence[Array]) -> Message:
        layout = Layout.of(wanted, arrays)
        return {"t": "done", "id": job["id"], "at": self._store(job, layout, arrays), "layout": layout}

    def _guarded(self, job_id: int, compute: Callable[[], Message]) -> Message:
        """Return what `compute` returns, or its failure as an answer."""
        try:
            return compute()
        except RemoraError as error:
            failure = error
        except MemoryError:
            failure = ResourceExhaustedError("the job needs more memory than its worker may use")
        except Exception as error:  # noqa: BLE001 - one job's fault must not end the others; reported to the agent
            failure = unexpected(error)
        return {"t": "failed", "id": job_id, "error": error_parts(failure)}

    def _compute(self, job: Message, stop: Stop) -> Message:
        if stop.requested:
            raise CancelledError("the job was stopped before it ran")
        if job["t"] == "noop":
            return {"t": "done", "id": job["id"]}
        if job["t"] == "compute":
            return {"t": "done", "id": job["id"], "out": self._calculate(job, stop)}
        model = self.model(job)
        if job["t"] == "infer":
            at, described = self._infer(job, model, stop)
            return {"t": "done", "id": job["id"], "at": at, "layout": described}
        task = self._task(job)
        answer, window = task.answer(self._picture(job), stop, self._limits)
        return self._seen(job, task, answer, window)

    def _task(self, job: Message) -> PictureTask:
        _model, name, task = self.models[job["m"]]
        wanted = PICTURES[job["t"]]
        if task is None or wanted != name:
            raise InvalidArgumentError(
                f"this model is for {name}, {job['t']} needs one for {wanted}",
                fix="use another model, or send tensors with infer",
            )
        return task

    def _picture(self, job: Message) -> memoryview:
        start, length = job["image"]
        return memoryview(self.arenas[job["a"]])[start : start + length]

    def _seen(self, job: Message, task: PictureTask, answer: Array, window: Window) -> Message:
        """Return what a model's answer says of a picture."""
        if job["t"] in MAPS:
            found = cast("Mapper", task).read(answer)
            layout = Layout.of(["map"], [found])
            return {"t": "done", "id": job["id"], "out": layout.places(self._store(job, layout, [found]))}
        return {"t": "done", "id": job["id"], "labels": cast("Finder", task).read(answer, window, job["top"])}

    def model(self, job: Message) -> LoadedModel:
        model = self.models.get(job["m"], (None,))[0]
        if model is None:
            raise InternalError("the model is not loaded in this worker")
        return model

    def _feeds(self, job: Message) -> dict[str, Array]:
        memory = self.arenas[job["a"]]
        feeds = {name: _array(memory, dtype, shape, offset) for name, dtype, shape, offset, _size in job["in"]}
        if job.get("shared"):
            # A client that changes an index after it was checked must not reach what lies beyond the array.
            exposed = self.model(job).exposure.inputs
            return {name: array if name in exposed else array.copy() for name, array in feeds.items()}
        return feeds

    def _calculate(self, job: Message, stop: Stop) -> list[list[object]]:
        memory = self.arenas[job["a"]]
        layout = Layout([Spec(name, dtype, tuple(shape)) for name, dtype, shape in job["out"]])
        into = [
            _array(memory, spec.dtype, spec.shape, job["off"] + offset)
            for spec, offset in zip(layout.specs, layout.offsets, strict=True)
        ]
        linalg.compute(job["f"], self._feeds(job), job["n"], into, stop)
        return layout.places(job["off"])

    def _infer(self, job: Message, model: LoadedModel, stop: Stop) -> tuple[int, Layout]:
        feeds = self._feeds(job)
        wanted, layout = self._plan(job, model, feeds)
        if layout is not None and layout.total >= _BIND_BYTES:
            target, start = self._place(job, layout.total)
            if not job.get("shared") or model.exposure.outputs.issuperset(wanted):
                into = [
                    _array(target, spec.dtype, spec.shape, start + offset)
                    for spec, offset in zip(layout.specs, layout.offsets, strict=True)
                ]
                model.run(feeds, wanted, stop, into)
                return start, layout
        computed = model.run(feeds, wanted, stop)
        if layout is None or not layout.fits(computed):
            layout = Layout.of(wanted, computed)
        return self._store(job, layout, computed), layout

    def _store(self, job: Message, layout: Layout, computed: Sequence[Array]) -> int:
        """Copy outputs into the job's block; returns where they begin."""
        target, start = self._place(job, layout.total)
        for spec, offset, array in zip(layout.specs, layout.offsets, computed, strict=True):
            _array(target, spec.dtype, spec.shape, start + offset)[...] = array
        return start

    def _plan(
        self, job: Message, model: LoadedModel, feeds: Mapping[str, Array]
    ) -> tuple[tuple[str, ...], Layout | None]:
        """Check the inputs, and work out the outputs; both are remembered for the next job of the same form."""
        key = job["m"], job["form"]
        known = self._plans.get(key)
        if known is None:
            wanted = model.check(feeds, job["out"])
            planned = model.plan(feeds, wanted)
            known = wanted, Layout(planned) if planned is not None else None
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = known
        return known

    def _place(self, job: Message, total: int) -> tuple[mmap.mmap, int]:
        """Return where the outputs may lie: the job's block, or a larger one that the agent is asked for."""
        if total <= job["len"]:
            return self.arenas[job["b"]], job["off"]
        event, place = threading.Event(), [0, 0, 0]
        self._needs[job["id"]] = event, place
        self._send(encode({"t": "need", "id": job["id"], "len": total}))
        event.wait()
        arena, start, room = place
        if room < total:
            raise ResourceExhaustedError(
                f"the outputs have {total} bytes, more than one job may return now", fix="ask for fewer outputs"
            )
        job["b"], job["off"], job["len"] = place
        return self.arenas[arena], start


def _array(memory: mmap.mmap, dtype: str, shape: Sequence[int], offset: int) -> Array:
    return np.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)


def unexpected(error: Exception) -> InternalError:
    return InternalError(f"the worker failed: {type(error).__name__}: {error}")
