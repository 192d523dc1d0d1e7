"""Messages of the kubelet's device plugin API, package `v1beta1`.

Source: https://github.com/kubernetes/kubelet/blob/master/pkg/apis/deviceplugin/v1beta1/api.proto. Left out is what this
plugin never sends: mounts, devices, CDI names.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, int32, int64, map_, message, string

VERSION = "v1beta1"
REGISTRATION = "v1beta1.Registration"
DEVICE_PLUGIN = "v1beta1.DevicePlugin"
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"


class Empty(Message):
    pass


class Options(Message):
    pre_start_required: bool = bool_(1)
    get_preferred_allocation_available: bool = bool_(2)


class RegisterRequest(Message):
    version: str = string(1)
    #: File name of the plugin's socket, beside the kubelet's.
    endpoint: str = string(2)
    resource_name: str = string(3)
    options: Options | None = message(4, Options)


class NumaNode(Message):
    id: int = int64(1)


class Topology(Message):
    nodes: list[NumaNode] = message(1, NumaNode, repeated=True)


class Device(Message):
    #: At most 63 characters.
    id: str = string(1)
    health: str = string(2)
    topology: Topology | None = message(3, Topology)


class ListAndWatchResponse(Message):
    devices: list[Device] = message(1, Device, repeated=True)


class ContainerPreferredRequest(Message):
    available: list[str] = string(1, repeated=True)
    #: Part of the answer in any case.
    must_include: list[str] = string(2, repeated=True)
    #: How many in all.
    size: int = int32(3)


class PreferredRequest(Message):
    container_requests: list[ContainerPreferredRequest] = message(1, ContainerPreferredRequest, repeated=True)


class ContainerPreferredResponse(Message):
    device_ids: list[str] = string(1, repeated=True)


class PreferredResponse(Message):
    container_responses: list[ContainerPreferredResponse] = message(1, ContainerPreferredResponse, repeated=True)


class ContainerAllocateRequest(Message):
    devices_ids: list[str] = string(1, repeated=True)


class AllocateRequest(Message):
    container_requests: list[ContainerAllocateRequest] = message(1, ContainerAllocateRequest, repeated=True)


class ContainerAllocateResponse(Message):
    envs: dict[str, str] = map_(1, "string", "string")
    annotations: dict[str, str] = map_(4, "string", "string")


class AllocateResponse(Message):
    container_responses: list[ContainerAllocateResponse] = message(1, ContainerAllocateResponse, repeated=True)
