"""Google's protobuf as the oracle: descriptors made from our own declarations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from remora.wire.protobuf import Field, Message

_TYPES = {
    "bool": "BOOL",
    "bytes": "BYTES",
    "double": "DOUBLE",
    "enum": "INT32",  # an open enum is an int32 on the wire
    "fixed32": "FIXED32",
    "fixed64": "FIXED64",
    "float": "FLOAT",
    "int32": "INT32",
    "int64": "INT64",
    "message": "MESSAGE",
    "sfixed32": "SFIXED32",
    "sfixed64": "SFIXED64",
    "sint32": "SINT32",
    "sint64": "SINT64",
    "string": "STRING",
    "uint32": "UINT32",
    "uint64": "UINT64",
}


class Oracle:
    """Google's classes for ours, made when first asked for."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        self._names: dict[type[Message], str] = {}
        self._files = 0

    def of(self, cls: type[Message]) -> Any:
        """Return Google's class for our `cls`."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(self._declare(cls)))

    def _declare(self, cls: type[Message]) -> str:
        if cls in self._names:
            return self._names[cls]
        name = f"m{len(self._names)}.{cls.__name__}"
        self._names[cls] = name
        package = name.split(".")[0]
        proto = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        message = proto.message_type.add(name=cls.__name__)
        for field in cls._fields.values():
            self._add(proto, message, field, name)
        self._pool.Add(proto)
        return name

    def _add(self, proto: Any, message: Any, field: Field, owner: str) -> None:
        added = message.field.add(name=field.name, number=field.number)
        added.label = 3 if field.repeated or field.map_key else 1
        if field.map_key:
            entry = message.nested_type.add(name=_camel(field.name) + "Entry")
            entry.options.map_entry = True
            self._type(proto, entry.field.add(name="key", number=1, label=1), field.map_key, None, owner)
            self._type(proto, entry.field.add(name="value", number=2, label=1), field.kind, field.cls, owner)
            added.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
            added.type_name = f".{owner}.{entry.name}"
            return
        self._type(proto, added, field.kind, field.cls, owner)
        if field.optional:
            added.proto3_optional = True
            added.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name="_" + field.name)

    def _type(self, proto: Any, added: Any, kind: str, cls: Any, owner: str) -> None:
        added.type = getattr(descriptor_pb2.FieldDescriptorProto, "TYPE_" + _TYPES[kind])
        if kind != "message":
            return
        cls = cls if isinstance(cls, type) else cls()
        name = self._names.get(cls) or self._declare(cls)
        added.type_name = "." + name
        dependency = name.split(".")[0] + ".proto"
        if name != owner and dependency not in proto.dependency:
            proto.dependency.append(dependency)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def to_google(oracle: Oracle, ours: Message) -> Any:
    """Return Google's message with the same content, set field by field."""
    theirs = oracle.of(type(ours))()
    for field in ours._fields.values():
        value = getattr(ours, field.name)
        if field.map_key:
            target = getattr(theirs, field.name)
            for key, item in value.items():
                if field.kind == "message":
                    target[key].CopyFrom(to_google(oracle, item))
                else:
                    target[key] = item
        elif field.kind == "message":
            if field.repeated:
                getattr(theirs, field.name).extend([to_google(oracle, item) for item in value])
            elif value is not None:
                getattr(theirs, field.name).CopyFrom(to_google(oracle, value))
        elif field.repeated:
            getattr(theirs, field.name).extend([_plain(item) for item in value])
        elif value is not None and (field.optional or value != field.default or str(value) == "-0.0"):
            setattr(theirs, field.name, _plain(value))
    return theirs


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def as_google(oracle: Oracle) -> Callable[[Message], Any]:
    return lambda ours: to_google(oracle, ours)
