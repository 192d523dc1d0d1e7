"""vAccel's enums as vaccel-python shows them: members with names, equal to their numbers on the wire."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from remora.wire import vaccel_enums as wire


class PluginType(IntFlag):
    """What kind of plugin a session asks for. This agent chooses by model format and device, and ignores it."""

    CPU = 0x1
    GPU = 0x2
    FPGA = 0x4
    SOFTWARE = 0x8
    TENSORFLOW = 0x10
    TORCH = 0x20
    JETSON = 0x40
    GENERIC = 0x80
    DEBUG = 0x100
    REMOTE = 0x4000
    ALL = 0xFFFF


def _members(source: type) -> dict[str, int]:
    return {name: number for name, number in vars(source).items() if isinstance(number, int)}


ResourceType = IntEnum("ResourceType", _members(wire.ResourceType))  # type: ignore[misc]  # made of plain integers
ArgType = IntEnum("ArgType", _members(wire.ArgType))  # type: ignore[misc]
OpType = IntEnum("OpType", _members(wire.OpType))  # type: ignore[misc]
