"""The worker process: maps arenas, loads models, runs jobs.

The main thread answers the control socket; each job thread takes jobs off the job socket by itself. Whatever goes wrong
with one job is an answer, never an end; the end of either socket ends the process at once.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import os
import select
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from remora.backends.contract import Limits, Stop
from remora.backends.formats import backend_for
from remora.errors import DataLossError, InvalidArgumentError, RemoraError, ResourceExhaustedError
from remora.workers import seccomp
from remora.workers.calibration import calibrate
from remora.workers.inside import bound_memory, confine_self
from remora.workers.packed import JOB, pack_answer, unpack_job
from remora.workers.protocol import MAX_MESSAGE_BYTES, Message, decode, encode, error_parts, pack, unpack
from remora.workers.runner import Runner, unexpected

if TYPE_CHECKING:
    from remora.backends.vision.tasks import PictureTask

_MAX_EARLY_STOPS = 1024
#: A worker that nobody wants for this long after its start imports what pictures need.
_IDLE_MS = 50


class Worker:
    """One process's state. Dicts are changed by the control thread only; job threads read them."""

    def __init__(self, jobs: socket.socket, control: socket.socket, limits: Limits) -> None:
        self._jobs = jobs
        self._control = control
        self._limits = limits
        self._device = "auto"
        self._threads = 1
        self._control_lock = threading.Lock()
        self._runner = Runner(jobs.send, limits)
        self._lock = threading.Lock()
        self._running: dict[int, Stop] = {}
        self._stopped_early: dict[int, None] = {}

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
            self._runner.grant(message)
        elif kind == "arena":
            self._runner.arenas[message["id"]] = mmap.mmap(fd, message["size"])
            os.close(fd)
            self._tell({"t": "arena", "id": message["id"]})
        elif kind == "drop":
            self._runner.arenas.pop(message["id"], None)
        elif kind == "load":
            threading.Thread(target=self._load, args=(message, fd), daemon=True).start()
        elif kind == "unload":
            self._runner.models.pop(message["m"], None)
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
            answer = {"t": "refused", "m": number, "error": error_parts(unexpected(error))}
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
        model = backend.load(data, self._device, self._limits, message["threads"])
        task = message["task"]
        pictures: PictureTask | None = None
        if task != "tensor":
            from remora.backends.vision.tasks import picture_task

            pictures = picture_task(task, model, message["manifest"], message["classes"])
        self._runner.models[number] = model, task, pictures
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
            model = self._runner.model(message)
            found = calibrate(model, message["shapes"], self._threads, message["most"], message["ms"] / 1000)
            self._tell({"t": "measured", "m": number, **found})
        except RemoraError as error:
            self._tell({"t": "measured", "m": number, "error": error_parts(error)})
        except Exception as error:  # noqa: BLE001 - a model that fails on samples may be right about them
            self._tell({"t": "measured", "m": number, "error": error_parts(unexpected(error))})

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
                    send(_answer(self._runner.run(jobs[0], stops[0])))
                else:
                    for answers in pack([_answer(answer) for answer in self._runner.run_together(jobs, stops)]):
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


def trim_memory() -> None:
    """Give memory that is free back to the kernel: the C library would keep it for the next allocation."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _answer(message: Message) -> bytes:
    if "layout" in message:
        return pack_answer(message["id"], message["us"], message.get("all", 0), message["at"], message["layout"])
    return encode(message)


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
