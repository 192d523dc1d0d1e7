"""Messages between containerd and a shim: the task service, events, and the calls of a shim's own command line.

Field numbers: containerd's api/ (runtime/task/v2, events, types, runtime/bootstrap/v1); versions 2 and 3 of the task
service have the same messages. Names are containerd's, with the package before them where two would be the same.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, bytes_, enum, int32, int64, map_, message, string, uint32, uint64
from remora.wire.ttrpc.messages import Any as AnyMessage

TASK_SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
EVENTS_SERVICE = "containerd.services.events.ttrpc.v1.Events"
#: Metadata key of the namespace.
NAMESPACE_KEY = "containerd-namespace-ttrpc"

# Status of a task.
UNKNOWN, CREATED, RUNNING, STOPPED, PAUSED, PAUSING = range(6)


class Empty(Message):
    pass


class Timestamp(Message):
    seconds: int = int64(1)
    nanos: int = int32(2)


class Mount(Message):
    type: str = string(1)
    source: str = string(2)
    target: str = string(3)
    options: list[str] = string(4, repeated=True)


# -- the task service ---------------------------------------------------------------------------------------------


class CreateTaskRequest(Message):
    id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = message(3, Mount, repeated=True)
    terminal: bool = bool_(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    checkpoint: str = string(8)
    parent_checkpoint: str = string(9)
    options: AnyMessage | None = message(10, AnyMessage)


class PidResponse(Message):
    """Of Create and Start."""

    pid: int = uint32(1)


class ProcessRequest(Message):
    """Of Start, Delete, Wait, State; of Pids, Pause, Resume, Stats and Connect, which use the first field alone."""

    id: str = string(1)
    exec_id: str = string(2)


class DeleteResponse(Message):
    pid: int = uint32(1)
    exit_status: int = uint32(2)
    exited_at: Timestamp | None = message(3, Timestamp)


class ExecProcessRequest(Message):
    id: str = string(1)
    exec_id: str = string(2)
    terminal: bool = bool_(3)
    stdin: str = string(4)
    stdout: str = string(5)
    stderr: str = string(6)
    spec: AnyMessage | None = message(7, AnyMessage)


class ResizePtyRequest(Message):
    id: str = string(1)
    exec_id: str = string(2)
    width: int = uint32(3)
    height: int = uint32(4)


class StateResponse(Message):
    id: str = string(1)
    bundle: str = string(2)
    pid: int = uint32(3)
    status: int = enum(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    terminal: bool = bool_(8)
    exit_status: int = uint32(9)
    exited_at: Timestamp | None = message(10, Timestamp)
    exec_id: str = string(11)


class KillRequest(Message):
    id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint32(3)
    all: bool = bool_(4)


class CloseIORequest(Message):
    id: str = string(1)
    exec_id: str = string(2)
    stdin: bool = bool_(3)


class ProcessInfo(Message):
    pid: int = uint32(1)
    info: AnyMessage | None = message(2, AnyMessage)


class PidsResponse(Message):
    processes: list[ProcessInfo] = message(1, ProcessInfo, repeated=True)


class CheckpointTaskRequest(Message):
    id: str = string(1)
    path: str = string(2)
    options: AnyMessage | None = message(3, AnyMessage)


class UpdateTaskRequest(Message):
    id: str = string(1)
    resources: AnyMessage | None = message(2, AnyMessage)
    annotations: dict[str, str] = map_(3, "string", "string")


class StatsResponse(Message):
    stats: AnyMessage | None = message(1, AnyMessage)


class WaitResponse(Message):
    exit_status: int = uint32(1)
    exited_at: Timestamp | None = message(2, Timestamp)


class ConnectResponse(Message):
    shim_pid: int = uint32(1)
    task_pid: int = uint32(2)
    version: str = string(3)


class ShutdownRequest(Message):
    id: str = string(1)
    now: bool = bool_(2)


TASK_METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "State": (ProcessRequest, StateResponse),
    "Create": (CreateTaskRequest, PidResponse),
    "Start": (ProcessRequest, PidResponse),
    "Delete": (ProcessRequest, DeleteResponse),
    "Pids": (ProcessRequest, PidsResponse),
    "Pause": (ProcessRequest, Empty),
    "Resume": (ProcessRequest, Empty),
    "Checkpoint": (CheckpointTaskRequest, Empty),
    "Kill": (KillRequest, Empty),
    "Exec": (ExecProcessRequest, Empty),
    "ResizePty": (ResizePtyRequest, Empty),
    "CloseIO": (CloseIORequest, Empty),
    "Update": (UpdateTaskRequest, Empty),
    "Wait": (ProcessRequest, WaitResponse),
    "Stats": (ProcessRequest, StatsResponse),
    "Connect": (ProcessRequest, ConnectResponse),
    "Shutdown": (ShutdownRequest, Empty),
}


# -- events -------------------------------------------------------------------------------------------------------


class TaskIO(Message):
    stdin: str = string(1)
    stdout: str = string(2)
    stderr: str = string(3)
    terminal: bool = bool_(4)


class TaskCreate(Message):
    container_id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = message(3, Mount, repeated=True)
    io: TaskIO | None = message(4, TaskIO)
    checkpoint: str = string(5)
    pid: int = uint32(6)


class TaskStart(Message):
    container_id: str = string(1)
    pid: int = uint32(2)


class TaskExit(Message):
    container_id: str = string(1)
    #: Of the exec, or of the container for its own process.
    id: str = string(2)
    pid: int = uint32(3)
    exit_status: int = uint32(4)
    exited_at: Timestamp | None = message(5, Timestamp)


class TaskDelete(Message):
    container_id: str = string(1)
    pid: int = uint32(2)
    exit_status: int = uint32(3)
    exited_at: Timestamp | None = message(4, Timestamp)
    id: str = string(5)


class TaskOOM(Message):
    container_id: str = string(1)


class TaskExecAdded(Message):
    container_id: str = string(1)
    exec_id: str = string(2)


class TaskExecStarted(Message):
    container_id: str = string(1)
    exec_id: str = string(2)
    pid: int = uint32(3)


class TaskPaused(Message):
    container_id: str = string(1)


class TaskResumed(Message):
    container_id: str = string(1)


#: Topic of each event.
TOPICS: dict[type[Message], str] = {
    TaskCreate: "/tasks/create",
    TaskStart: "/tasks/start",
    TaskExit: "/tasks/exit",
    TaskDelete: "/tasks/delete",
    TaskOOM: "/tasks/oom",
    TaskExecAdded: "/tasks/exec-added",
    TaskExecStarted: "/tasks/exec-started",
    TaskPaused: "/tasks/paused",
    TaskResumed: "/tasks/resumed",
}


class Envelope(Message):
    timestamp: Timestamp | None = message(1, Timestamp)
    namespace: str = string(2)
    topic: str = string(3)
    event: AnyMessage | None = message(4, AnyMessage)


class ForwardRequest(Message):
    envelope: Envelope | None = message(1, Envelope)


# -- the shim's command line --------------------------------------------------------------------------------------


class RuntimeVersion(Message):
    version: str = string(1)
    revision: str = string(2)


class RuntimeInfo(Message):
    """What `-info` writes."""

    name: str = string(1)
    version: RuntimeVersion | None = message(2, RuntimeVersion)
    annotations: dict[str, str] = map_(5, "string", "string")


class RuntimeOptions(Message):
    """`runtimeoptions.v1.Options`, in Create.options."""

    type_url: str = string(1)
    config_path: str = string(2)
    config_body: bytes = bytes_(3)


# -- metrics (github.com/containerd/cgroups): the fields that CRI and `ctr tasks metrics` show ------------------------


class PidsStat(Message):
    current: int = uint64(1)
    limit: int = uint64(2)


class CpuUsageV1(Message):
    total: int = uint64(1)
    kernel: int = uint64(2)
    user: int = uint64(3)


class ThrottleV1(Message):
    periods: int = uint64(1)
    throttled_periods: int = uint64(2)
    throttled_time: int = uint64(3)


class CpuStatV1(Message):
    usage: CpuUsageV1 | None = message(1, CpuUsageV1)
    throttling: ThrottleV1 | None = message(2, ThrottleV1)


class MemoryEntryV1(Message):
    limit: int = uint64(1)
    usage: int = uint64(2)
    max: int = uint64(3)
    failcnt: int = uint64(4)


class MemoryStatV1(Message):
    rss: int = uint64(2)
    total_rss: int = uint64(19)
    total_pg_fault: int = uint64(25)
    total_pg_maj_fault: int = uint64(26)
    total_inactive_file: int = uint64(29)
    usage: MemoryEntryV1 | None = message(33, MemoryEntryV1)


class MetricsV1(Message):
    pids: PidsStat | None = message(2, PidsStat)
    cpu: CpuStatV1 | None = message(3, CpuStatV1)
    memory: MemoryStatV1 | None = message(4, MemoryStatV1)


class CpuStatV2(Message):
    usage_usec: int = uint64(1)
    user_usec: int = uint64(2)
    system_usec: int = uint64(3)
    nr_periods: int = uint64(4)
    nr_throttled: int = uint64(5)
    throttled_usec: int = uint64(6)


class MemoryStatV2(Message):
    anon: int = uint64(1)
    inactive_file: int = uint64(13)
    pgfault: int = uint64(18)
    pgmajfault: int = uint64(19)
    usage: int = uint64(32)
    usage_limit: int = uint64(33)


class MetricsV2(Message):
    pids: PidsStat | None = message(1, PidsStat)
    cpu: CpuStatV2 | None = message(2, CpuStatV2)
    memory: MemoryStatV2 | None = message(4, MemoryStatV2)


METRICS_V1_URL = "io.containerd.cgroups.v1.Metrics"
METRICS_V2_URL = "io.containerd.cgroups.v2.Metrics"
