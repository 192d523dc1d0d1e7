"""The part of Kubernetes' container runtime interface that the tests speak (runtime.v1; k8s.io/cri-api, api.proto)."""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, bytes_, enum, int32, int64, map_, message, string, uint32, uint64

# NamespaceMode
POD, CONTAINER, NODE, TARGET = range(4)
# ContainerState
CREATED, RUNNING, EXITED, UNKNOWN = range(4)
READY = 0


class Empty(Message):
    pass


class Int64Value(Message):
    value: int = int64(1)


class UInt64Value(Message):
    value: int = uint64(1)


class NamespaceOption(Message):
    network: int = enum(1)
    pid: int = enum(2)
    ipc: int = enum(3)


class SandboxSecurity(Message):
    namespace_options: NamespaceOption | None = message(1, NamespaceOption)


class Resources(Message):
    cpu_period: int = int64(1)
    cpu_quota: int = int64(2)
    cpu_shares: int = int64(3)
    memory_limit_in_bytes: int = int64(4)


class LinuxSandbox(Message):
    cgroup_parent: str = string(1)
    security_context: SandboxSecurity | None = message(2, SandboxSecurity)
    sysctls: dict[str, str] = map_(3, "string", "string")
    overhead: Resources | None = message(4, Resources)
    resources: Resources | None = message(5, Resources)


class SandboxMetadata(Message):
    name: str = string(1)
    uid: str = string(2)
    namespace: str = string(3)
    attempt: int = uint32(4)


class Dns(Message):
    servers: list[str] = string(1, repeated=True)
    searches: list[str] = string(2, repeated=True)
    options: list[str] = string(3, repeated=True)


class SandboxConfig(Message):
    metadata: SandboxMetadata | None = message(1, SandboxMetadata)
    hostname: str = string(2)
    log_directory: str = string(3)
    dns_config: Dns | None = message(4, Dns)
    labels: dict[str, str] = map_(6, "string", "string")
    annotations: dict[str, str] = map_(7, "string", "string")
    linux: LinuxSandbox | None = message(8, LinuxSandbox)


class RunPodSandboxRequest(Message):
    config: SandboxConfig | None = message(1, SandboxConfig)
    runtime_handler: str = string(2)


class SandboxId(Message):
    """Of several requests, and of RunPodSandbox's answer."""

    pod_sandbox_id: str = string(1)


class NetworkStatus(Message):
    ip: str = string(1)


class SandboxStatus(Message):
    id: str = string(1)
    state: int = enum(3)
    network: NetworkStatus | None = message(5, NetworkStatus)


class SandboxStatusResponse(Message):
    status: SandboxStatus | None = message(1, SandboxStatus)


class Sandbox(Message):
    id: str = string(1)
    metadata: SandboxMetadata | None = message(2, SandboxMetadata)


class SandboxList(Message):
    items: list[Sandbox] = message(1, Sandbox, repeated=True)


class ContainerMetadata(Message):
    name: str = string(1)
    attempt: int = uint32(2)


class ImageSpec(Message):
    image: str = string(1)


class KeyValue(Message):
    key: str = string(1)
    value: str = string(2)


class Mount(Message):
    container_path: str = string(1)
    host_path: str = string(2)
    readonly: bool = bool_(3)


class Capability(Message):
    add_capabilities: list[str] = string(1, repeated=True)
    drop_capabilities: list[str] = string(2, repeated=True)


class SecurityProfile(Message):
    #: 0: the runtime's default, 1: none.
    profile_type: int = enum(1)


class ContainerSecurity(Message):
    capabilities: Capability | None = message(1, Capability)
    privileged: bool = bool_(2)
    namespace_options: NamespaceOption | None = message(3, NamespaceOption)
    run_as_user: Int64Value | None = message(5, Int64Value)
    run_as_username: str = string(6)
    readonly_rootfs: bool = bool_(7)
    supplemental_groups: list[int] = int64(8, repeated=True)
    no_new_privs: bool = bool_(11)
    seccomp: SecurityProfile | None = message(15, SecurityProfile)


class LinuxContainer(Message):
    resources: Resources | None = message(1, Resources)
    security_context: ContainerSecurity | None = message(2, ContainerSecurity)


class Device(Message):
    container_path: str = string(1)
    host_path: str = string(2)
    permissions: str = string(3)


class ContainerConfig(Message):
    metadata: ContainerMetadata | None = message(1, ContainerMetadata)
    image: ImageSpec | None = message(2, ImageSpec)
    command: list[str] = string(3, repeated=True)
    args: list[str] = string(4, repeated=True)
    working_dir: str = string(5)
    envs: list[KeyValue] = message(6, KeyValue, repeated=True)
    mounts: list[Mount] = message(7, Mount, repeated=True)
    devices: list[Device] = message(8, Device, repeated=True)
    labels: dict[str, str] = map_(9, "string", "string")
    annotations: dict[str, str] = map_(10, "string", "string")
    log_path: str = string(11)
    stdin: bool = bool_(12)
    stdin_once: bool = bool_(13)
    tty: bool = bool_(14)
    linux: LinuxContainer | None = message(15, LinuxContainer)


class CreateContainerRequest(Message):
    pod_sandbox_id: str = string(1)
    config: ContainerConfig | None = message(2, ContainerConfig)
    sandbox_config: SandboxConfig | None = message(3, SandboxConfig)


class ContainerId(Message):
    """Of several requests, and of CreateContainer's answer."""

    container_id: str = string(1)


class StopContainerRequest(Message):
    container_id: str = string(1)
    timeout: int = int64(2)


class ContainerStatus(Message):
    id: str = string(1)
    state: int = enum(3)
    started_at: int = int64(5)
    finished_at: int = int64(6)
    exit_code: int = int32(7)
    reason: str = string(10)
    message: str = string(11)


class ContainerStatusResponse(Message):
    status: ContainerStatus | None = message(1, ContainerStatus)


class UpdateRequest(Message):
    container_id: str = string(1)
    linux: Resources | None = message(2, Resources)


class ExecSyncRequest(Message):
    container_id: str = string(1)
    cmd: list[str] = string(2, repeated=True)
    timeout: int = int64(3)


class ExecSyncResponse(Message):
    stdout: bytes = bytes_(1)
    stderr: bytes = bytes_(2)
    exit_code: int = int32(3)


class ExecRequest(Message):
    container_id: str = string(1)
    cmd: list[str] = string(2, repeated=True)
    tty: bool = bool_(3)
    stdin: bool = bool_(4)
    stdout: bool = bool_(5)
    stderr: bool = bool_(6)


class AttachRequest(Message):
    container_id: str = string(1)
    stdin: bool = bool_(2)
    tty: bool = bool_(3)
    stdout: bool = bool_(4)
    stderr: bool = bool_(5)


class PortForwardRequest(Message):
    pod_sandbox_id: str = string(1)
    port: list[int] = int32(2, repeated=True)


class UrlResponse(Message):
    url: str = string(1)


class CpuUsage(Message):
    usage_core_nano_seconds: UInt64Value | None = message(2, UInt64Value)


class MemoryUsage(Message):
    working_set_bytes: UInt64Value | None = message(2, UInt64Value)


class ContainerStats(Message):
    cpu: CpuUsage | None = message(2, CpuUsage)
    memory: MemoryUsage | None = message(3, MemoryUsage)


class ContainerStatsResponse(Message):
    stats: ContainerStats | None = message(1, ContainerStats)


class LinuxSandboxStats(Message):
    cpu: CpuUsage | None = message(1, CpuUsage)
    memory: MemoryUsage | None = message(2, MemoryUsage)


class SandboxStats(Message):
    linux: LinuxSandboxStats | None = message(2, LinuxSandboxStats)


class SandboxStatsResponse(Message):
    stats: SandboxStats | None = message(1, SandboxStats)
