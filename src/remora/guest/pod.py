"""The pod service, `remora.guest.v1.Pod`: containers that come and go in one microVM, by bundles the host wrote."""

from __future__ import annotations

import os

from remora.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from remora.guest import cgroup, files, network, pod_roots, rootfs, system
from remora.guest.container import CRUN, start_error
from remora.guest.containers import MAIN
from remora.guest.oom import OomWatch
from remora.guest.stdio import Stdio
from remora.wire import guest_pod_v1 as v1
from remora.wire.guest_v1 import Empty, StartResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional

    from remora.errors import RemoraError
    from remora.guest.children import Children
    from remora.guest.container import Container
    from remora.guest.containers import Containers
    from remora.guest.running import Running
    from remora.reactor import Reactor
    from remora.wire.ttrpc.calls import Call

#: Holds the PID namespace that a pod's containers share, and reaps what they leave there.
_PAUSE = (system.BUSYBOX, "unshare", "-p", "-f", system.BUSYBOX, "sh", "-c", "while :; do sleep 86400 & wait; done")


class Pod:
    def __init__(self, reactor: Reactor, children: Children, containers: Containers) -> None:
        self._reactor = reactor
        self._children = children
        self._containers = containers
        self._roots = pod_roots.Roots()
        self._pause_pid = 0
        self._ooms = OomWatch(reactor)
        self._methods: Dict[str, Callable[[Call, Any], None]] = {
            "Configure": self._configure,
            "Create": self._create,
            "AttachDisk": self._attach_disk,
            "Start": self._start,
            "Exec": self._exec,
            "Remove": self._remove,
            "Pause": lambda call, request: self._freeze(call, request, True),
            "Resume": lambda call, request: self._freeze(call, request, False),
            "Update": self._update,
            "Stats": self._stats,
            "Pids": self._pids,
            "OomKills": self._oom_kills,
            "PutFiles": self._put_files,
            "GetFile": self._get_file,
        }

    def handle(self, call: Call) -> None:
        """Answer one call; a RemoraError that this raises is the answer."""
        method = self._methods.get(call.method)
        if method is None:
            raise UnimplementedError(f"the guest has no method {call.service}/{call.method}")
        method(call, v1.METHODS[call.method][0].decode(call.payload))

    # -- the pod ----------------------------------------------------------------------------------------------------

    def _configure(self, call: Call, request: v1.ConfigureRequest) -> None:
        if request.identity is not None:
            system.identify(request.identity)
            rootfs.set_hostname(request.identity.hostname or request.identity.sandbox)
        self._roots.configure(request.scratch)
        network.configure(request)
        for sysctl in request.sysctls:
            _set_sysctl(sysctl.name, sysctl.value)
        call.respond(Empty())

    def _put_files(self, call: Call, request: v1.PutFilesRequest) -> None:
        files.put(request)
        call.respond(Empty())

    def _get_file(self, call: Call, request: v1.GetFileRequest) -> None:
        call.respond(v1.GetFileResponse(content=files.get(request.volume, request.path, request.limit)))

    # -- containers -------------------------------------------------------------------------------------------------

    def _create(self, call: Call, request: v1.CreateRequest) -> None:
        if request.id == MAIN or "/" in request.id:
            raise InvalidArgumentError(f"a pod's container cannot be called {request.id!r}")
        container = self._containers.add(request.id, pod_roots.bundle(request.id))
        try:
            self._roots.mount(request)
        except BaseException:
            self._containers.remove(container)
            self._roots.unmount(request.id)
            raise
        if request.shared_pids:
            self._share_pids()
        call.respond(Empty())

    def _attach_disk(self, call: Call, request: v1.AttachDiskRequest) -> None:
        major, minor = self._roots.attach(request.serial, request.size_bytes)
        call.respond(v1.AttachDiskResponse(major=major, minor=minor))

    def _share_pids(self) -> None:
        """Have a PID namespace at `v1.SHARED_PIDS` that lasts as long as the pod."""
        if self._pause_pid:
            return
        pid = system.spawn(_PAUSE, system.null(), system.null(), system.null())
        # unshare forks the namespace's first process and waits for it: its own namespace for children is the one.
        path = f"/proc/{pid}/ns/pid_for_children"
        for _ in range(1000):
            if os.path.exists(path) and os.readlink(path) != os.readlink("/proc/1/ns/pid"):
                break
            system.pause_s(0.002)
        system.write_text(v1.SHARED_PIDS, "")
        system.run([system.BUSYBOX, "mount", "--bind", path, v1.SHARED_PIDS])
        self._pause_pid = pid

    def _start(self, call: Call, request: v1.StartRequest) -> None:
        container = self._containers.get(request.id)
        container.check(request.id)
        stdio = Stdio(self._reactor, terminal=request.terminal, stdin=request.stdin)
        answer = _Answer(call)

        def started(error: Optional[RemoraError]) -> None:
            if error is None:
                self._ooms.watch(container.name, container.kills_before)
            answer.started(error)

        answer.running = container.run(stdio, request.command, started)

    def _exec(self, call: Call, request: v1.ExecRequest) -> None:
        container_id, _, exec_id = request.id.partition("/")
        container = self._containers.get(container_id)
        if not exec_id:
            raise InvalidArgumentError(f"the process id {request.id!r} names no exec: write <container>/<exec>")
        container.check(request.id)
        stdio = Stdio(self._reactor, terminal=request.terminal, stdin=request.stdin)
        answer = _Answer(call)
        process = bytes(request.process).decode()
        answer.running = container.exec(request.id, stdio, request.command, process, answer.started)

    def _remove(self, call: Call, request: v1.ContainerRequest) -> None:
        container = self._containers.get(request.id)
        cgroup.kill(container.name)
        pid = system.spawn([*CRUN, "delete", "--force", container.name], system.null(), system.null(), system.null())

        def deleted(_status: int) -> None:
            self._containers.remove(container)
            self._ooms.forget(container.name)
            cgroup.remove(container.name)
            self._roots.unmount(container.name)
            call.respond(Empty())

        self._children.when_ended(pid, deleted)

    def _freeze(self, call: Call, request: v1.ContainerRequest, frozen: bool) -> None:
        container = self._alive(request.id)
        cgroup.freeze(container.name, frozen)
        call.respond(Empty())

    def _alive(self, name: str) -> Container:
        container = self._containers.get(name)
        if container.first is None or not container.first.alive:
            raise FailedPreconditionError(f"the container {name!r} does not run")
        return container

    def _update(self, call: Call, request: v1.UpdateRequest) -> None:
        container = self._alive(request.id)
        base = f"{rootfs.BASE}/update-{container.name}"
        system.write_text(base + ".json", bytes(request.resources).decode())
        argv = [*CRUN, "--log", base + ".log", "update", "--resources", base + ".json", container.name]
        pid = system.spawn(argv, system.null(), system.null(), system.null())

        def updated(status: int) -> None:
            log = files.take_text(base + ".log")
            files.take_text(base + ".json")
            if status:
                call.fail(start_error("update", log, status))
            else:
                call.respond(Empty())

        self._children.when_ended(pid, updated)

    def _stats(self, call: Call, request: v1.ContainerRequest) -> None:
        name = self._containers.get(request.id).name
        memory = cgroup.table(name, "memory.stat")
        cpu = cgroup.table(name, "cpu.stat")
        call.respond(
            v1.StatsResponse(
                memory_bytes=cgroup.number(name, "memory.current"),
                memory_limit_bytes=cgroup.number(name, "memory.max"),
                anon_bytes=memory.get("anon", 0),
                inactive_file_bytes=memory.get("inactive_file", 0),
                page_faults=memory.get("pgfault", 0),
                major_faults=memory.get("pgmajfault", 0),
                cpu_us=cpu.get("usage_usec", 0),
                cpu_user_us=cpu.get("user_usec", 0),
                cpu_system_us=cpu.get("system_usec", 0),
                cpu_periods=cpu.get("nr_periods", 0),
                cpu_throttled=cpu.get("nr_throttled", 0),
                cpu_throttled_us=cpu.get("throttled_usec", 0),
                pids=cgroup.number(name, "pids.current"),
                pids_limit=cgroup.number(name, "pids.max"),
                oom_kills=cgroup.oom_kills(name),
                guest_memory_bytes=rootfs.memory_bytes()["MemTotal"],
            )
        )

    def _pids(self, call: Call, request: v1.ContainerRequest) -> None:
        call.respond(v1.PidsResponse(pids=cgroup.pids(self._containers.get(request.id).name)))

    def _oom_kills(self, call: Call, request: v1.OomKillsRequest) -> None:
        self._ooms.answer(call, request.seen)


class _Answer:
    """Answers a start once crun has done its part."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.running: Optional[Running] = None

    def started(self, error: Optional[RemoraError]) -> None:
        if error is not None:
            self._call.fail(error)
        elif self.running is not None:
            self._call.respond(StartResponse(pid=self.running.pid))


def _set_sysctl(name: str, value: str) -> None:
    path = "/proc/sys/" + name.replace(".", "/")
    if ".." in name:
        raise InvalidArgumentError(f"the sysctl {name!r} has a bad name")
    try:
        system.write_text(path, value)
    except OSError as error:
        raise InvalidArgumentError(f"the sysctl {name}={value} cannot be set in the guest: {error.strerror}") from error
