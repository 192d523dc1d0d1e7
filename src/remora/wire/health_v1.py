"""Messages of `grpc.health.v1.Health`, which the agent answers over ttrpc and gRPC alike.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, string, uint32

SERVICE = "grpc.health.v1.Health"
SERVING = 1
NOT_SERVING = 2
#: To watchers only: `Check` says NOT_FOUND.
SERVICE_UNKNOWN = 3
STATES = {0: "unknown", SERVING: "serving", NOT_SERVING: "not serving"}


class CheckRequest(Message):
    #: Full name of a service; empty for the server as a whole.
    service: str = string(1)


class CheckResponse(Message):
    status: int = uint32(1)
