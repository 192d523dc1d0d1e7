"""What gRPC writes into HTTP/2 headers, as pure functions.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from math import ceil
from urllib.parse import quote

from remora.agent.hints import again_s, hint
from remora.errors import InvalidArgumentError, RemoraError
from remora.wire.ttrpc.messages import Status

RESPONSE_HEADERS = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-accept-encoding", "identity")]
OK_TRAILERS = [("grpc-status", "0")]
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
#: Proxies and clients drop responses whose headers are long (8 KiB is common).
_MAX_MESSAGE = 2000
#: What a status message may hold unescaped: printable ASCII but the percent sign.
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def unacceptable(headers: Mapping[str, str]) -> int:
    """Return the HTTP status by which something that is no gRPC request is refused; 0 if it is one."""
    if headers.get(":method") != "POST":
        return 405
    kind = headers.get("content-type", "")
    if kind != "application/grpc" and not kind.startswith(("application/grpc+", "application/grpc;")):
        return 415
    return 0


def timeout_s(text: str) -> float | None:
    """Return the seconds that a `grpc-timeout` header grants; None if it is absent.

    Raises:
        InvalidArgumentError: it is not a number and a unit.
    """
    if not text:
        return None
    found = _TIMEOUT.fullmatch(text)
    if found is None:
        raise InvalidArgumentError(f"grpc-timeout {text[:40]!r} is not up to 8 digits and one of H, M, S, m, u, n")
    return int(found[1]) * _UNIT_S[found[2]]


def refusal_headers(error: RemoraError) -> list[tuple[str, str]]:
    """Return the only headers of an answer without a message."""
    return [*RESPONSE_HEADERS[:2], *refusal_trailers(error)]


def refusal_trailers(error: RemoraError) -> list[tuple[str, str]]:
    """Return what ends an answer with a status.

    When it is worth sending again is said twice: to whoever reads error details (google.rpc.RetryInfo), and to the
    client's own retries (gRFC A6).
    """
    message = str(error)[:_MAX_MESSAGE]
    headers = [("grpc-status", str(error.code)), ("grpc-message", quote(message, safe=_PLAIN))]
    after_s = again_s(error)
    if after_s is not None:
        details = b64encode(Status(code=error.code, message=message, details=[hint(after_s)]).to_bytes())
        headers.append(("grpc-status-details-bin", details.decode("ascii").rstrip("=")))
        headers.append(("grpc-retry-pushback-ms", str(ceil(after_s * 1000))))
    return headers
