"""Messages of `remora.control.v1.Control`, the agent's owner-only control socket.

Whoever runs sandboxes (the sandbox monitor, the shim) attaches each one here under its identity. Identity is what the
host says in `Attach`; nothing that the guest sends can change it.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, double, map_, message, string, uint32, uint64

SERVICE = "remora.control.v1.Control"


class Empty(Message):
    pass


class AttachRequest(Message):
    #: Identity of the sandbox, unique on this node: [a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}.
    sandbox: str = string(1)
    #: Who pays and whose resources are shared; empty: the sandbox is a tenant of its own.
    tenant: str = string(2)
    labels: dict[str, str] = map_(3, "string", "string")
    #: The agent listens on `<directory>/channel.sock_2048` (mode 0600) before it answers. May be empty if `cid` is not.
    directory: str = string(4)
    #: The template this sandbox is a clone of: its sessions may be forked by this sandbox, and by no other.
    parent: str = string(5)
    #: True for a template: its sessions outlive its connections, until it is detached.
    template: bool = bool_(6)
    #: The guest's vsock CID, where the VMM uses the kernel's vsock: connections from it are this sandbox's.
    cid: int = uint32(7)
    #: Ids of grants that the sandbox's containers carry. Those of earlier calls stay; what is refused is in the log.
    grants: list[str] = string(8, repeated=True)


class GrantRequest(Message):
    """States shares of accelerators that the kubelet gives to a container, before the container knows of them."""

    #: 32 hexadecimal digits that nobody can guess: whoever's sandbox presents them first has the shares.
    id: str = string(1)
    #: `gpu` or `cpu`.
    kind: str = string(2)
    shares: list[str] = string(3, repeated=True)
    #: Into how many shares each device is cut.
    shares_per_device: int = uint32(4)


class DetachRequest(Message):
    #: Closes the sandbox's socket, connections and sessions, and frees what only they held. Unknown is no error.
    sandbox: str = string(1)
    #: True to keep the sessions for clones although the template's microVM is gone (only for templates).
    keep_sessions: bool = bool_(2)


class GrantedShares(Message):
    kind: str = string(1)
    shares: int = uint32(2)
    shares_per_device: int = uint32(3)


class Attachment(Message):
    sandbox: str = string(1)
    tenant: str = string(2)
    labels: dict[str, str] = map_(3, "string", "string")
    directory: str = string(4)
    parent: str = string(5)
    template: bool = bool_(6)
    connections: int = uint32(7)
    sessions: int = uint32(8)
    requests: int = uint64(9)
    cid: int = uint32(10)
    #: What it was granted, by kind.
    grants: list[GrantedShares] = message(11, GrantedShares, repeated=True)


class AttachmentsResponse(Message):
    attachments: list[Attachment] = message(1, Attachment, repeated=True)


class WorkerStatus(Message):
    id: str = string(1)
    pid: int = uint32(2)
    #: `shared` or the tenant's name.
    domain: str = string(3)
    backend: str = string(4)
    models: list[str] = string(5, repeated=True)
    busy: bool = bool_(6)
    restarts: int = uint32(7)
    device: str = string(8)
    #: Resident memory.
    memory_bytes: int = uint64(9)
    #: Jobs it has in hand.
    jobs: int = uint32(10)


class StatusResponse(Message):
    version: str = string(1)
    pid: int = uint32(2)
    uptime_s: float = double(3)
    listeners: list[str] = string(4, repeated=True)
    sessions: int = uint32(5)
    connections: int = uint32(6)
    workers: list[WorkerStatus] = message(7, WorkerStatus, repeated=True)
    store_bytes: int = uint64(8)
    metrics_address: str = string(9)


class DrainRequest(Message):
    #: What still runs after this long is given up; 0: as long as a request may take.
    timeout_s: float = double(1)
    #: True if another agent has the listening sockets: what is new waits for it instead of being refused. If this
    #: connection ends before the answer, that agent has died, and the drain is off.
    successor: bool = bool_(2)


class HandoverRequest(Message):
    #: Where the successor listens, SOCK_SEQPACKET: the agent connects once and sends one message, a JSON list of
    #: addresses with as many listening sockets (SCM_RIGHTS, unix(7)).
    socket: str = string(1)
    #: How many it has already.
    after: int = uint32(2)


class HandoverResponse(Message):
    #: How many there are.
    total: int = uint32(1)
    #: The agent's state directory.
    state: str = string(2)


class DrainResponse(Message):
    #: Answered when nothing runs any more, just before the agent exits.
    given_up: int = uint32(1)
    pid: int = uint32(2)


class PolicyResponse(Message):
    #: The configuration in effect: its file (empty: built-in defaults), its text, and why the last reload was refused.
    file: str = string(1)
    text: str = string(2)
    refused: str = string(3)


class PageRequest(Message):
    """Asks for a part of a list: a node has many thousands of sessions, and its loop must not stop for all of them."""

    #: Only what belongs to this tenant; empty for all.
    tenant: str = string(1)
    offset: int = uint32(2)
    #: At most this many; the agent may return fewer. An empty page is the end.
    limit: int = uint32(3)


class SessionEntry(Message):
    id: str = string(1)
    tenant: str = string(2)
    #: Key of the identity it belongs to.
    owner: str = string(3)
    #: True for a session of vAccel's protocol.
    vaccel: bool = bool_(4)
    template: bool = bool_(5)
    connections: int = uint32(6)
    models: list[str] = string(7, repeated=True)
    #: Resources that it keeps from eviction.
    resources: int = uint32(8)
    #: How long it lives without a connection; 0 while it has one.
    lease_s: float = double(9)


class SessionsResponse(Message):
    sessions: list[SessionEntry] = message(1, SessionEntry, repeated=True)


class ResourceEntry(Message):
    digest: str = string(1)
    tenant: str = string(2)
    size_bytes: int = uint64(3)
    #: Sessions of the tenant that hold it.
    holds: int = uint32(4)
    #: Seconds since the epoch.
    used_at_s: float = double(5)
    #: True if it is a model that a worker of the tenant has in memory.
    loaded: bool = bool_(6)


class ResourcesResponse(Message):
    resources: list[ResourceEntry] = message(1, ResourceEntry, repeated=True)


class LoadedModel(Message):
    name: str = string(1)
    #: `shared` or the tenant's name.
    domain: str = string(2)
    task: str = string(3)
    device: str = string(4)
    memory_bytes: int = uint64(5)
    #: Sessions that loaded it; requests may use a catalogue model without loading it.
    sessions: int = uint32(6)


class LoadedModelsResponse(Message):
    models: list[LoadedModel] = message(1, LoadedModel, repeated=True)


class TenantUsage(Message):
    """Counters of a tenant since the agent started, and what it has now. `other`: all that have none of their own."""

    tenant: str = string(1)
    requests: int = uint64(2)
    refusals: int = uint64(3)
    received_bytes: int = uint64(4)
    sent_bytes: int = uint64(5)
    device_us: int = uint64(6)
    #: Operations by the time from arrival to result: as many numbers as `UsageResponse.bounds_s` and one more.
    durations: list[int] = uint64(7, repeated=True)
    sessions: int = uint32(8)
    connections: int = uint32(9)
    queued: int = uint32(10)
    running: int = uint32(11)


class ModelUsage(Message):
    """Counters of an operation on a model for all tenants; `uploaded` is all models that tenants uploaded."""

    operation: str = string(1)
    model: str = string(2)
    requests: int = uint64(3)
    #: Time in each stage.
    queue_us: int = uint64(4)
    batch_us: int = uint64(5)
    run_us: int = uint64(6)
    copy_us: int = uint64(7)


class DeviceUsage(Message):
    device: str = string(1)
    #: Time that operations ran on it; more than the clock where several run at once.
    busy_us: int = uint64(2)
    #: What its models take, as they say.
    memory_bytes: int = uint64(3)
    models: int = uint32(4)


class UsageResponse(Message):
    #: On the agent's monotonic clock: rates are differences of two answers.
    time_s: float = double(1)
    draining: bool = bool_(2)
    #: Upper bounds of `TenantUsage.durations`, seconds.
    bounds_s: list[float] = double(3, repeated=True)
    tenants: list[TenantUsage] = message(4, TenantUsage, repeated=True)
    models: list[ModelUsage] = message(5, ModelUsage, repeated=True)
    devices: list[DeviceUsage] = message(6, DeviceUsage, repeated=True)
    status: StatusResponse | None = message(7, StatusResponse)


METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "Attach": (AttachRequest, Empty),
    "Grant": (GrantRequest, Empty),
    "Detach": (DetachRequest, Empty),
    "Attachments": (Empty, AttachmentsResponse),
    "Status": (Empty, StatusResponse),
    "Drain": (DrainRequest, DrainResponse),
    "Handover": (HandoverRequest, HandoverResponse),
    "Policy": (Empty, PolicyResponse),
    "Sessions": (PageRequest, SessionsResponse),
    "Resources": (PageRequest, ResourcesResponse),
    "LoadedModels": (Empty, LoadedModelsResponse),
    "Usage": (Empty, UsageResponse),
}
