"""The worker process: maps arenas, loads models, runs jobs.

The main thread answers the control socket; each job thread takes jobs off the job socket by itself. Whatever goes wrong
with one job is an answer, never an end; the end of either socket ends the process at once.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import mmap
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

from remora.backends import linalg
from remora.backends.contract import Array, Limits, LoadedModel, Spec, Stop
from remora.backends.formats import backend_for
from remora.errors import (
    CancelledError,
    DataLossError,
    InternalError,
    InvalidArgumentError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.workers import seccomp
from remora.workers.calibration import calibrate
from remora.workers.contract import MAPS, PICTURES
from remora.workers.inside import bound_memory, confine_self
from remora.workers.joining import JoinedRun, Member
from remora.workers.layout import Layout
from remora.workers.packed import JOB, pack_answer, unpack_job
from remora.workers.protocol import MAX_MESSAGE_BYTES, Message, decode, encode, error_parts, pack, unpack

if TYPE_CHECKING:
    from remora.backends.vision.tasks import Finder, Mapper, PictureTask

#: Outputs at least this large are computed straight into the arena; below, binding costs more than the copy.
_BIND_BYTES = 64 * 1024
_MAX_EARLY_STOPS = 1024
#: A worker that nobody wants for this long after its start imports what pictures need.
_IDLE_MS = 50
_MOST_PLANS = 256


class Worker:
    """One process's state. Dicts are changed by the control thread only; job threads read them."""

    def __init__(self, jobs: socket.socket, control: socket.socket, limits: Limits) -> None:
        self._jobs = jobs
        self._control = control
        self._limits = limits
        self._device = "auto"
        self._threads = 1
        self._control_lock = threading.Lock()
        self._arenas: dict[int, mmap.mmap] = {}
        self._models: dict[int, tuple[LoadedModel, str, PictureTask | None]] = {}
        self._lock = threading.Lock()
        self._running: dict[int, Stop] = {}
        self._stopped_early: dict[int, None] = {}
        self._plans: dict[tuple[object, ...], tuple[tuple[str, ...], Layout | None]] = {}
        self._needs: dict[int, tuple[threading.Event, list[int]]] = {}

    # -- control ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer the control socket until it ends."""
        self._tell({"t": "hello"})
        wanted = select.poll()  # which is what the filter allows
        wanted.register(self._control, select.POLLIN)
        if not wanted.poll(_IDLE_MS):
            import remora.backends.vision.tasks  # noqa: F401 - for whoever comes; a first model need not wait for it
        while True:
            data, fds, _flags, _address = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            self._handle(decode(data), fds[0] if fds else -1)

    def _handle(self, message: Message, fd: int) -> None:
        kind = message["t"]
        if kind == "cancel":
            self._cancel(message["id"])
        elif kind == "block":
            event, place = self._needs.pop(message["id"], (None, []))
            if event is not None:
                place[:] = [message["b"], message["off"], message["len"]]
                event.set()
        elif kind == "arena":
            self._arenas[message["id"]] = mmap.mmap(fd, message["size"])
            os.close(fd)
            self._tell({"t": "arena", "id": message["id"]})
        elif kind == "drop":
            self._arenas.pop(message["id"], None)
        elif kind == "load":
            threading.Thread(target=self._load, args=(message, fd), daemon=True).start()
        elif kind == "unload":
            self._models.pop(message["m"], None)
            trim_memory()
        elif kind == "measure":
            threading.Thread(target=self._measure, args=(message,), daemon=True).start()
        elif kind == "assign":
            self._assign(message)

    def _assign(self, message: Message) -> None:
        bound_memory(message["memory"])
        self._device = message["device"]
        self._threads = message["threads"]
        for number in range(message["threads"]):
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True).start()

    def _load(self, message: Message, fd: int) -> None:
        number = message["m"]
        try:
            answer = self._open(message, fd)
        except RemoraError as error:
            answer = {"t": "refused", "m": number, "error": error_parts(error)}
        except MemoryError:
            full = ResourceExhaustedError("the model does not fit into the memory of its worker")
            answer = {"t": "refused", "m": number, "error": error_parts(full)}
        except Exception as error:  # noqa: BLE001 - the border of a hostile model: reported, never swallowed
            answer = {"t": "refused", "m": number, "error": error_parts(_unexpected(error))}
        trim_memory()  # the agent measures now what the model keeps, without the file and what was parsed of it
        self._tell(answer)

    def _open(self, message: Message, fd: int) -> Message:
        number, key = message["m"], message["key"]
        with os.fdopen(fd, "rb") as file:
            data = file.read(self._limits.model_bytes + 1)
        if len(data) > self._limits.model_bytes:
            raise InvalidArgumentError(f"the model file is larger than {self._limits.model_bytes} bytes")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != message["digest"]:
            raise DataLossError(f"the file of model {key} is not the one with digest {message['digest']}")
        backend = backend_for(message["format"])
        model = backend.load(data, self._device, self._limits)
        task = message["task"]
        pictures: PictureTask | None = None
        if task != "tensor":
            from remora.backends.vision.tasks import picture_task

            pictures = picture_task(task, model, message["manifest"], message["classes"])
        self._models[number] = model, task, pictures
        return {
            "t": "loaded",
            "m": number,
            "inputs": [[spec.name, spec.dtype, spec.shape] for spec in model.inputs],
            "outputs": [[spec.name, spec.dtype, spec.shape] for spec in model.outputs],
            "device": model.device,
            "by": f"{backend.name} {backend.version}",
            "mem": model.memory_bytes,
        }

    def _measure(self, message: Message) -> None:
        number = message["m"]
        try:
            model = self._model(message)
            found = calibrate(model, message["shapes"], self._threads, message["most"], message["ms"] / 1000)
            self._tell({"t": "measured", "m": number, **found})
        except RemoraError as error:
            self._tell({"t": "measured", "m": number, "error": error_parts(error)})
        except Exception as error:  # noqa: BLE001 - a model that fails on samples may be right about them
            self._tell({"t": "measured", "m": number, "error": error_parts(_unexpected(error))})

    def _tell(self, message: Message) -> None:
        with self._control_lock:
            self._control.send(encode(message))

    def _cancel(self, job_id: int) -> None:
        with self._lock:
            stop = self._running.get(job_id)
            if stop is None:
                # Not taken off the socket yet, or just answered; the bound keeps the latter from piling up.
                self._stopped_early[job_id] = None
                if len(self._stopped_early) > _MAX_EARLY_STOPS:
                    del self._stopped_early[next(iter(self._stopped_early))]
                return
        stop.request()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        receive, send = self._jobs.recv, self._jobs.send
        while True:
            data = receive(MAX_MESSAGE_BYTES)
            if not data:
                os._exit(0)
            jobs = [unpack_job(part) if part[0] == JOB else decode(part) for part in unpack(data)]
            stops = [self._enter(job["id"]) for job in jobs]
            try:
                if len(jobs) == 1:
                    send(_answer(self._run(jobs[0], stops[0])))
                else:
                    for answers in pack([_answer(answer) for answer in self._run_together(jobs, stops)]):
                        send(answers)
            finally:
                with self._lock:
                    for job in jobs:
                        del self._running[job["id"]]

    def _enter(self, job_id: int) -> Stop:
        """Make a job known to `_cancel`."""
        stop = Stop()
        with self._lock:
            self._running[job_id] = stop
            if job_id in self._stopped_early:
                del self._stopped_early[job_id]
                stop.request()
        return stop

    def _run(self, job: Message, stop: Stop) -> Message:
        started = time.perf_counter_ns()
        answer = self._guarded(job["id"], lambda: self._compute(job, stop))
        answer["us"] = (time.perf_counter_ns() - started) // 1000
        return answer

    def _run_together(self, jobs: Sequence[Message], stops: Sequence[Stop]) -> list[Message]:
        """Answer jobs that came as one: in one run if that works, else each by itself."""
        started = time.perf_counter_ns()
        answers: list[Message] = []
        alone = list(zip(jobs, stops, strict=True))
        with suppress(RemoraError, KeyError, ValueError):  # whose fault it is shows when each runs by itself
            members = [Member(job, self._feeds(job), stop) for job, stop in alone]
            model = self._model(jobs[0])
            wanted, _layout = self._plan(jobs[0], model, members[0].feeds)
            run = JoinedRun(members, self._let_go)
            for one, arrays in run.run(model, wanted):
                answers.append(self._guarded(one.job["id"], partial(self._part, one.job, wanted, arrays)))
                answers[-1]["rows"] = one.rows
            alone = [(one.job, one.stop) for one in run.remaining()]
        joined_us = (time.perf_counter_ns() - started) // 1000
        for answer in answers:
            answer.update({"us": joined_us * answer.pop("rows") // run.rows, "all": joined_us})
        for job, stop in alone:
            answer = self._run(job, stop)
            answer["us"] += joined_us // len(jobs)
            answers.append(answer)
        return answers

    def _let_go(self, one: Member) -> None:
        """Answer a member that was given up, without waiting for the others."""
        error = CancelledError("the job was stopped while it ran with others")
        self._jobs.send(encode({"t": "failed", "id": one.job["id"], "error": error_parts(error), "us": 0}))

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
            failure = _unexpected(error)
        return {"t": "failed", "id": job_id, "error": error_parts(failure)}

    def _compute(self, job: Message, stop: Stop) -> Message:
        if stop.requested:
            raise CancelledError("the job was stopped before it ran")
        if job["t"] == "noop":
            return {"t": "done", "id": job["id"]}
        if job["t"] == "compute":
            return {"t": "done", "id": job["id"], "out": self._calculate(job, stop)}
        model = self._model(job)
        if job["t"] == "infer":
            at, described = self._infer(job, model, stop)
            return {"t": "done", "id": job["id"], "at": at, "layout": described}
        _model, task, pictures = self._models[job["m"]]
        memory = self._arenas[job["a"]]
        wanted = PICTURES[job["t"]]
        if pictures is None or wanted != task:
            raise InvalidArgumentError(
                f"this model is for {task}, {job['t']} needs one for {wanted}",
                fix="use another model, or send tensors with infer",
            )
        start, length = job["image"]
        picture = memoryview(memory)[start : start + length]
        if job["t"] in MAPS:
            found = cast("Mapper", pictures).map(picture, stop, self._limits)
            layout = Layout.of(["map"], [found])
            return {"t": "done", "id": job["id"], "out": layout.places(self._store(job, layout, [found]))}
        return {
            "t": "done",
            "id": job["id"],
            "labels": cast("Finder", pictures).find(picture, job["top"], stop, self._limits),
        }

    def _model(self, job: Message) -> LoadedModel:
        model = self._models.get(job["m"], (None,))[0]
        if model is None:
            raise InternalError("the model is not loaded in this worker")
        return model

    def _feeds(self, job: Message) -> dict[str, Array]:
        memory = self._arenas[job["a"]]
        feeds = {name: _array(memory, dtype, shape, offset) for name, dtype, shape, offset, _size in job["in"]}
        if job.get("shared"):
            # A client that changes an index after it was checked must not reach what lies beyond the array.
            exposed = self._model(job).exposure.inputs
            return {name: array if name in exposed else array.copy() for name, array in feeds.items()}
        return feeds

    def _calculate(self, job: Message, stop: Stop) -> list[list[object]]:
        memory = self._arenas[job["a"]]
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
            return self._arenas[job["b"]], job["off"]
        event, place = threading.Event(), [0, 0, 0]
        self._needs[job["id"]] = event, place
        self._jobs.send(encode({"t": "need", "id": job["id"], "len": total}))
        event.wait()
        arena, start, room = place
        if room < total:
            raise ResourceExhaustedError(
                f"the outputs have {total} bytes, more than one job may return now", fix="ask for fewer outputs"
            )
        job["b"], job["off"], job["len"] = place
        return self._arenas[arena], start


def trim_memory() -> None:
    """Give memory that is free back to the kernel: the C library would keep it for the next allocation."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _answer(message: Message) -> bytes:
    if "layout" in message:
        return pack_answer(message["id"], message["us"], message.get("all", 0), message["at"], message["layout"])
    return encode(message)


def _array(memory: mmap.mmap, dtype: str, shape: Sequence[int], offset: int) -> Array:
    return np.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)


def _unexpected(error: Exception) -> InternalError:
    return InternalError(f"the worker failed: {type(error).__name__}: {error}")


def main(argv: Sequence[str]) -> None:
    """Serve: job socket, control socket, open files, processes, model bytes, pixels, filter, all as numbers."""
    job_fd, control_fd, open_files, processes, model_bytes, pixels, filtered = (int(part) for part in argv)
    confine_self(open_files, processes)
    backend_for("onnx")  # nearly every worker's; imported before one is needed
    if filtered:
        seccomp.install("models")
    limits = Limits(model_bytes=model_bytes, pixels=pixels)
    gc.freeze()  # what is imported stays: no collection between two jobs looks at it
    worker = Worker(socket.socket(fileno=job_fd), socket.socket(fileno=control_fd), limits)
    try:
        worker.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent is gone: so are we
    sys.stderr.flush()
    os._exit(0)
