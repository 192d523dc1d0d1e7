"""The worker process of one library: maps arenas, loads the library, calls its functions one at a time.

It imports no runtime of models: it starts in a fifth of the time of `workers.main`, which counts, as libraries crash,
and leaves hostile code less to play with. The main thread answers the control socket, one other takes jobs.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from remora.backends.library import Library, Value
from remora.errors import InternalError, RemoraError, ResourceExhaustedError
from remora.workers import seccomp
from remora.workers.arena import aligned
from remora.workers.inside import bound_memory, confine_self
from remora.workers.protocol import MAX_MESSAGE_BYTES, Message, decode, encode, error_parts, library_path


class LibraryWorker:
    """One process's state. Arenas are changed by the control thread only."""

    def __init__(self, jobs: socket.socket, control: socket.socket) -> None:
        self._jobs = jobs
        self._control = control
        self._arenas: dict[int, mmap.mmap] = {}
        self._library: Library | None = None

    def serve(self) -> None:
        """Answer the control socket until it ends."""
        self._tell({"t": "hello"})
        while True:
            data, fds, _flags, _address = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            message = decode(data)
            kind = message["t"]
            if kind == "arena":
                self._arenas[message["id"]] = mmap.mmap(fds[0], message["size"])
                os.close(fds[0])
                self._tell({"t": "arena", "id": message["id"]})
            elif kind == "drop":
                self._arenas.pop(message["id"], None)
            elif kind == "load":
                self._load(message)
            elif kind == "assign":
                bound_memory(message["memory"])
                threading.Thread(target=self._work, name="job", daemon=True).start()
            # A call cannot be stopped from within: `cancel` is left to the agent, which kills.

    def _load(self, message: Message) -> None:
        """Load the one library that this process is for; from then on no file is opened."""
        digests = message["digests"]
        answer: Message = {"t": "loaded", "m": message["m"], "inputs": [], "outputs": [], "device": "cpu", "mem": 0}
        try:
            self._library = Library([Path(library_path(index)) for index in range(len(digests))], digests)
            if not seccomp.install("library"):
                raise InternalError("there is no system call filter for this machine")
        except RemoraError as error:
            answer = {"t": "refused", "m": message["m"], "error": error_parts(error)}
        except MemoryError:
            full = ResourceExhaustedError("the library does not fit into the memory of its worker")
            answer = {"t": "refused", "m": message["m"], "error": error_parts(full)}
        self._tell(answer)

    def _tell(self, message: Message) -> None:
        self._control.send(encode(message))

    def _work(self) -> None:
        while True:
            data = self._jobs.recv(MAX_MESSAGE_BYTES)
            if not data:
                os._exit(0)
            job = decode(data)
            started = time.perf_counter_ns()
            try:
                answer: Message = {"t": "done", "id": job["id"], "out": self._call(job)}
            except RemoraError as error:
                answer = {"t": "failed", "id": job["id"], "error": error_parts(error)}
            except MemoryError:
                full = ResourceExhaustedError("the call needs more memory than its worker may use")
                answer = {"t": "failed", "id": job["id"], "error": error_parts(full)}
            answer["us"] = (time.perf_counter_ns() - started) // 1000
            self._jobs.send(encode(answer))

    def _call(self, job: Message) -> list[list[object]]:
        if self._library is None or job["t"] != "exec":
            raise InternalError(f"a library's worker cannot do {job['t']!r}, or has no library yet")
        memory = memoryview(self._arenas[job["a"]])
        values = []
        for name, _dtype, _shape, offset, size in job["in"]:
            kind, _, custom = name.partition(":")
            values.append(Value(memory[offset : offset + size], int(kind), int(custom)))
        first = len(values) - len(job["out"])
        results = self._library.call(job["f"], values[:first], values[first:])
        places: list[list[object]] = []
        start = job["off"]
        for (name, dtype, (room,)), result in zip(job["out"], results, strict=True):
            memory[start : start + len(result)] = result
            places.append([name, dtype, [len(result)], start, len(result)])
            start += aligned(room)
        return places


def main(argv: Sequence[str]) -> None:
    """Serve: job socket, control socket, open files, processes, as numbers; what models need besides is ignored."""
    job_fd, control_fd, open_files, processes = (int(part) for part in argv[:4])
    confine_self(open_files, processes)
    seccomp.install("loading")
    worker = LibraryWorker(socket.socket(fileno=job_fd), socket.socket(fileno=control_fd))
    try:
        worker.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent is gone: so are we
    sys.stderr.flush()
    os._exit(0)
