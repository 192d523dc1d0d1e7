"""Messages of OTLP's trace export, those fields of them that the agent sends.

Source: https://github.com/open-telemetry/opentelemetry-proto (collector/trace/v1, trace/v1, common/v1, resource/v1).
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bytes_, fixed32, fixed64, int64, message, string, uint32

KIND_INTERNAL = 1
KIND_SERVER = 2
STATUS_ERROR = 2


class AnyValue(Message):
    #: One of them is set.
    string_value: str | None = string(1, optional=True)
    int_value: int | None = int64(3, optional=True)


class KeyValue(Message):
    key: str = string(1)
    value: AnyValue | None = message(2, AnyValue)


class Status(Message):
    message: str = string(2)
    code: int = uint32(3)


class Span(Message):
    trace_id: bytes = bytes_(1)
    span_id: bytes = bytes_(2)
    trace_state: str = string(3)
    parent_span_id: bytes = bytes_(4)
    name: str = string(5)
    kind: int = uint32(6)
    start_time_unix_nano: int = fixed64(7)
    end_time_unix_nano: int = fixed64(8)
    attributes: list[KeyValue] = message(9, KeyValue, repeated=True)
    status: Status | None = message(15, Status)
    flags: int = fixed32(16)


class Scope(Message):
    name: str = string(1)
    version: str = string(2)


class ScopeSpans(Message):
    scope: Scope | None = message(1, Scope)
    spans: list[Span] = message(2, Span, repeated=True)


class Resource(Message):
    attributes: list[KeyValue] = message(1, KeyValue, repeated=True)


class ResourceSpans(Message):
    resource: Resource | None = message(1, Resource)
    scope_spans: list[ScopeSpans] = message(2, ScopeSpans, repeated=True)


class ExportRequest(Message):
    resource_spans: list[ResourceSpans] = message(1, ResourceSpans, repeated=True)


def attributes(values: dict[str, str | int]) -> list[KeyValue]:
    """Return attributes; empty strings are left out."""
    return [
        KeyValue(key=key, value=AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value))
        for key, value in values.items()
        if value != ""
    ]
