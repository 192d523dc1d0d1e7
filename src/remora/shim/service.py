"""containerd's task service: each call checked, and done here or by a thread if it takes longer.

The reactor's thread answers what is known (State, Wait, Connect, Pids of the record) at once, also while a microVM
boots. What asks the guest or the host runs in a thread per request and comes back to the reactor for every change.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import remora
from remora.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    UnavailableError,
    UnimplementedError,
)
from remora.reactor import Reactor
from remora.shim import exits, memory, oom, spec, stats
from remora.shim.events import Publisher, timestamp
from remora.shim.pod import Pod
from remora.shim.streams import Streams
from remora.shim.task import NOT_EXECUTED, Process, Task, exec_request, start_request
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1
from remora.wire.protobuf import DecodeError, Message
from remora.wire.ttrpc.calls import Call

_GONE = "process already finished: not found"
#: A container that was killed may not delay the deletion of its pod.
_REMOVE_S = 10.0
#: A guest that does not take a signal within this time is silent.
_SIGNAL_S = 10.0
#: What was being made for somebody who has gone may take so long to be undone.
_ABANDON_S = 5.0
#: Answers are made in the reactor's thread, work in a thread of its own.
_SLOW = ("Create", "Start", "Delete", "Kill", "Pause", "Resume", "ResizePty", "Update", "Stats", "Pids")


class TaskService:
    """Args:
    on_idle: called after Shutdown when no container is left.
    """

    def __init__(
        self,
        reactor: Reactor,
        publisher: Publisher,
        socket_path: str,
        on_idle: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._publisher = publisher
        self._socket_path = socket_path
        self._on_idle = on_idle
        self._tasks: dict[str, Task] = {}
        self._locks: dict[str, threading.Lock] = {}
        self.pod = Pod(reactor, self._machine_ended)
        self._ooms = oom.OomEvents(reactor, publisher, self.pod, self._tasks)
        self._usage = stats.Usage(self.pod)
        self._exits = exits.Exits(reactor, publisher, self.pod, self._ooms)
        self.created = False

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def handle(self, call: Call) -> None:
        """Answer one call; a RemoraError that this raises is the answer."""
        if call.service not in c.TASK_SERVICES or call.method not in c.TASK_METHODS:
            raise UnimplementedError(f"{call.service}/{call.method} is not served")
        try:
            request: Any = c.TASK_METHODS[call.method][0].decode(call.payload)
        except DecodeError as error:
            raise InvalidArgumentError(f"{call.method}: {error}") from error
        method = getattr(self, f"_{call.method.lower()}")
        if call.method == "Create":
            call.on_cancel(lambda _error: self._abandoned(request.id))
        if call.method == "Wait":
            self._wait(call, request)
        elif call.method in _SLOW:
            threading.Thread(target=self._slow, args=(call, method, request), name=call.method, daemon=True).start()
        else:
            call.respond(method(request))

    def _slow(self, call: Call, method: Callable[[Any], Message], request: Any) -> None:
        try:
            # One change of a container at a time; a slow one of another does not matter.
            if call.method in ("Create", "Delete"):
                with self._locks.setdefault(request.id, threading.Lock()):
                    answer = method(request)
            else:
                answer = method(request)
        except RemoraError as error:
            self._later(call.fail, error)
        except Exception as error:  # noqa: BLE001 - the border of the request: told to its caller
            internal = InternalError(f"{call.method}: {type(error).__name__}: {error}")
            self._reactor.on_error(error)
            self._later(call.fail, internal)
        else:
            if call.method == "Create":
                self._later(lambda created: self._created(call, created, request.id), answer)
            else:
                self._later(call.respond, answer)

    def _created(self, call: Call, answer: Message, container: str) -> bool:
        """Answer a Create; undo it where its caller has gone meanwhile (containerd died while the microVM booted): the
        next containerd has looked already, and would never ask for it."""
        if call.respond(answer):
            return True
        threading.Thread(target=self._undo, args=(container,), name="undo", daemon=True).start()
        return False

    def _abandoned(self, container: str) -> None:
        """Whoever asked for a microVM has gone before it was up: do not boot it to its end, which may be long."""
        if self._tasks or container not in self._locks:
            return
        self.pod.kill()
        self._end_when_undone(container, self._reactor.now_s() + _ABANDON_S)

    def _end_when_undone(self, container: str, deadline_s: float) -> None:
        # A thread that waits for its turn to boot does not see that it is no longer wanted.
        if self._locks[container].locked() and self._reactor.now_s() < deadline_s:
            self._reactor.call_later(0.05, lambda: self._end_when_undone(container, deadline_s))
        else:
            self._shut_down_if_empty(None)

    def _undo(self, container: str) -> None:
        task = self._tasks.get(container)
        if task is None or task.process.status != c.CREATED:
            return
        try:
            self._delete(c.ProcessRequest(id=container))
        except RemoraError as error:
            self._reactor.on_error(error)
        self._later(self._shut_down_if_empty, None)

    def _later(self, what: Callable[[Any], object], value: Any) -> None:
        def now() -> None:
            what(value)

        self._reactor.post(now)

    def _task(self, container: str) -> Task:
        task = self._tasks.get(container)
        if task is None:
            raise NotFoundError(f"container {container} is not one of this pod: not found")
        return task

    def _process(self, container: str, exec_id: str) -> Process:
        process = self._task(container).find(exec_id)
        if process is None:
            raise NotFoundError(f"exec {exec_id} of container {container}: not found")
        return process

    # -- creating ---------------------------------------------------------------------------------------------------

    def _create(self, request: c.CreateTaskRequest) -> c.PidResponse:
        if request.checkpoint:
            raise UnimplementedError("a microVM cannot be started from a checkpoint")
        if request.id in self._tasks:
            raise AlreadyExistsError(f"container {request.id} exists: already exists")
        self.created = True
        with open(os.path.join(request.bundle, "config.json"), "rb") as file:
            config: dict[str, Any] = json.load(file)
        role = spec.kind(config, request.id).role
        streams = Streams(self._reactor, request.stdin, request.stdout, request.stderr, request.terminal)
        task = Task(request.id, request.bundle, role, Process(request.id, "", streams))
        task.config = config
        try:
            if role != "container":
                self.pod.boot(config, request, self._socket_path)
            if role != "sandbox":
                self.pod.add(task, request)
        except BaseException:
            if role != "container":
                self.pod.close()
            raise
        task.process.pid = self.pod.pid
        self._tasks[request.id] = task
        memory.give_back()
        io = c.TaskIO(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal)
        self._publish(
            c.TaskCreate(
                container_id=request.id, bundle=request.bundle, rootfs=request.rootfs, io=io, pid=task.process.pid
            )
        )
        return c.PidResponse(pid=task.process.pid)

    def _exec(self, request: c.ExecProcessRequest) -> c.Empty:
        task = self._task(request.id)
        if request.exec_id in task.execs:
            raise AlreadyExistsError(f"exec {request.exec_id} exists: already exists")
        if task.role == "sandbox":
            raise FailedPreconditionError("a pod's sandbox runs no process to execute others beside")
        process = Process(
            request.id,
            request.exec_id,
            Streams(self._reactor, request.stdin, request.stdout, request.stderr, request.terminal),
        )
        described = json.loads(bytes(request.spec.value)) if request.spec is not None else {}
        process.spec = spec.guest_process(described)
        process.pid = self.pod.pid
        task.execs[request.exec_id] = process
        self._publish(c.TaskExecAdded(container_id=request.id, exec_id=request.exec_id))
        return c.Empty()

    def _start(self, request: c.ProcessRequest) -> c.PidResponse:
        task = self._task(request.id)
        process = self._process(request.id, request.exec_id)
        if process.status != c.CREATED:
            raise FailedPreconditionError(f"{request.exec_id or request.id} was started before")
        if process.exec_id and not task.process.runs:
            raise FailedPreconditionError(f"container {request.id} does not run: nothing can be started in it")
        if task.role == "sandbox":
            self._started(process, c.TaskStart(container_id=request.id, pid=process.pid))
            return c.PidResponse(pid=process.pid)
        guest, streams = self.pod.vm.guest, process.streams
        socks = {name: guest.open_stream(process.guest_id, name) for name in streams.wanted}
        self.pod.vm.in_reactor(lambda: streams.attach(socks))
        try:
            if process.exec_id:
                self.pod.vm.pod("Exec", exec_request(process))
                event: Message = c.TaskExecStarted(container_id=request.id, exec_id=process.exec_id, pid=process.pid)
            else:
                self.pod.vm.pod("Start", start_request(task))
                event = c.TaskStart(container_id=request.id, pid=process.pid)
        except BaseException:
            self.pod.vm.in_reactor(streams.close)
            if task.role == "single":
                # Whoever made it may never ask for it again (`ctr run` does not), and its microVM is of no use.
                self.pod.close()
                self._reactor.post(lambda: self._exits.never_started(task, NOT_EXECUTED))
            raise
        self._started(process, event)
        self._exits.watch(task, process)
        self._reactor.post(self._ooms.watch)
        return c.PidResponse(pid=process.pid)

    def _started(self, process: Process, event: Message) -> None:
        process.status = c.RUNNING
        self._publish(event)

    # -- what is known ----------------------------------------------------------------------------------------------

    def _state(self, request: c.ProcessRequest) -> c.StateResponse:
        task = self._task(request.id)
        process = self._process(request.id, request.exec_id)
        stdin, stdout, stderr = process.streams.paths
        return c.StateResponse(
            id=request.id,
            bundle=task.bundle,
            pid=process.pid,
            status=process.status,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=process.streams.terminal,
            exit_status=process.exit_status,
            exited_at=timestamp(process.exited_ns) if process.exited else None,
            exec_id=process.exec_id,
        )

    def _wait(self, call: Call, request: c.ProcessRequest) -> None:
        def answer(process: Process) -> None:
            exited_at = timestamp(process.exited_ns)
            call.respond(c.WaitResponse(exit_status=process.exit_status, exited_at=exited_at))

        self._process(request.id, request.exec_id).when_exited(answer)

    def _connect(self, request: c.ProcessRequest) -> c.ConnectResponse:
        task = self._tasks.get(request.id)
        return c.ConnectResponse(
            shim_pid=os.getpid(), task_pid=task.process.pid if task is not None else 0, version=remora.__version__
        )

    def _pids(self, request: c.ProcessRequest) -> c.PidsResponse:
        return c.PidsResponse(processes=[c.ProcessInfo(pid=pid) for pid in self._usage.pids(self._task(request.id))])

    def _stats(self, request: c.ProcessRequest) -> c.StatsResponse:
        return c.StatsResponse(stats=self._usage.stats(self._task(request.id)))

    # -- while it runs ----------------------------------------------------------------------------------------------

    def _kill(self, request: c.KillRequest) -> c.Empty:
        task = self._task(request.id)
        process = self._process(request.id, request.exec_id)
        if process.exited:
            raise NotFoundError(_GONE)
        if process.exec_id and process.status == c.CREATED:
            raise FailedPreconditionError(f"exec {process.exec_id} was not started")
        if task.role == "sandbox":
            self._reactor.post(lambda: self._exits.sandbox(task, 128 + request.signal, self._tasks))
            return c.Empty()
        if process.status == c.CREATED:
            self._reactor.post(lambda: self._exits.never_started(task, 128 + request.signal))
            return c.Empty()
        if request.signal == 9:
            self._reactor.post(lambda: self._exits.killed(process))
        try:
            if task.process.status == c.PAUSED and request.signal == 9:
                self._set_frozen(task, False)
            self.pod.vm.guest.signal(process.guest_id, request.signal, everything=request.all, timeout_s=_SIGNAL_S)
        except DeadlineExceededError as error:
            # It is on its way. Whoever stops the container waits for its end, not for this answer, and then kills it.
            self._reactor.on_error(error)
        except (NotFoundError, UnavailableError) as error:
            # Its microVM has ended in this moment, too: the exit is on its way, and who stops a pod goes on by this.
            raise NotFoundError(_GONE) from error
        return c.Empty()

    def _pause(self, request: c.ProcessRequest) -> c.Empty:
        task = self._task(request.id)
        if task.process.status != c.RUNNING or not task.in_guest:
            raise FailedPreconditionError(f"container {request.id} does not run: it cannot be paused")
        self._set_frozen(task, True)
        return c.Empty()

    def _resume(self, request: c.ProcessRequest) -> c.Empty:
        task = self._task(request.id)
        if task.process.status != c.PAUSED:
            raise FailedPreconditionError(f"container {request.id} is not paused")
        self._set_frozen(task, False)
        return c.Empty()

    def _set_frozen(self, task: Task, frozen: bool) -> None:
        self.pod.vm.pod("Pause" if frozen else "Resume", v1.ContainerRequest(id=task.id))
        if task.process.runs:
            task.process.status = c.PAUSED if frozen else c.RUNNING
        event = c.TaskPaused(container_id=task.id) if frozen else c.TaskResumed(container_id=task.id)
        self._publish(event)

    def _resizepty(self, request: c.ResizePtyRequest) -> c.Empty:
        process = self._process(request.id, request.exec_id)
        if process.streams.terminal and process.runs and request.width and request.height:
            self.pod.vm.guest.resize(process.guest_id, request.height, request.width)
        return c.Empty()

    def _closeio(self, request: c.CloseIORequest) -> c.Empty:
        self._process(request.id, request.exec_id).streams.close_stdin()
        return c.Empty()

    def _update(self, request: c.UpdateTaskRequest) -> c.Empty:
        task = self._task(request.id)
        if request.resources is not None and task.in_guest:
            self.pod.update(task, json.loads(bytes(request.resources.value)))
        return c.Empty()

    def _checkpoint(self, _request: c.CheckpointTaskRequest) -> c.Empty:
        raise UnimplementedError("a container of a microVM cannot be checkpointed", fix="see docs/kubernetes.md")

    # -- the end ----------------------------------------------------------------------------------------------------

    def _delete(self, request: c.ProcessRequest) -> c.DeleteResponse:
        task = self._task(request.id)
        process = self._process(request.id, request.exec_id)
        if process.runs:
            raise FailedPreconditionError(f"{request.exec_id or request.id} still runs: it cannot be deleted")
        if process.exec_id:
            del task.execs[process.exec_id]
        else:
            if task.role == "container":
                self.pod.remove(task)
            else:
                self.pod.close()
            del self._tasks[task.id]
        self._reactor.post(process.streams.close)
        exited_at = timestamp(process.exited_ns or time.time_ns())
        answer = c.DeleteResponse(pid=process.pid, exit_status=process.exit_status, exited_at=exited_at)
        if not process.exec_id:
            self._publish(
                c.TaskDelete(
                    container_id=task.id, pid=process.pid, exit_status=process.exit_status, exited_at=exited_at
                )
            )
        return answer

    def _shutdown(self, _request: c.ShutdownRequest) -> c.Empty:
        self._shut_down_if_empty(None)
        return c.Empty()

    def _shut_down_if_empty(self, _nothing: None) -> None:
        if not self._tasks:
            # An answer needs the loop's next turns to go out.
            self._reactor.call_later(0.02, self._on_idle)

    def _machine_ended(self, error: RemoraError) -> None:
        self._reactor.on_error(error)
        self._exits.machine_ended(self._tasks)

    def _publish(self, event: Message) -> None:
        self._publisher.publish(event)
