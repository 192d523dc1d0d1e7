"""Where traces go, by the command line and OpenTelemetry's variables.

Apart from the exporter, whose HTTP client and OpenSSL cost each start 25 ms that most agents have no use for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from remora.errors import InvalidArgumentError

_PATH = "/v1/traces"


@dataclass(frozen=True)
class TraceOptions:
    """Where traces go. `ratio` of requests that bring no trace context of their own are followed."""

    endpoint: str
    ratio: float = 1.0
    service: str = "remora-agent"
    headers: Mapping[str, str] = field(default_factory=dict)


def options(endpoint: str | None, ratio: float | None, environment: Mapping[str, str]) -> TraceOptions | None:
    """Return where traces go by the command line, else by OpenTelemetry's variables; None: nowhere.

    Source: https://opentelemetry.io/docs/specs/otel/protocol/exporter/.

    Raises:
        InvalidArgumentError: the endpoint, the ratio or the protocol cannot be.
    """
    url = endpoint or environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not url and base:
        url = base.rstrip("/") + _PATH
    if not url or (endpoint is None and environment.get("OTEL_SDK_DISABLED", "").lower() == "true"):
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgumentError(
            f"{url[:200]!r} is no place for traces", fix="give http://HOST:4318 or https://..., an OTLP/HTTP receiver"
        )
    if parts.path in ("", "/"):
        url = url.rstrip("/") + _PATH
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environment.get(name, "")
        if protocol not in ("", "http/protobuf") and endpoint is None:
            raise InvalidArgumentError(
                f"{name}={protocol[:40]} is not spoken here", fix="set it to http/protobuf, and use the port for it"
            )
    if ratio is None:
        ratio = _ratio(environment.get("OTEL_TRACES_SAMPLER_ARG", ""))
    if not 0 <= ratio <= 1:
        raise InvalidArgumentError(f"{ratio:g} is no share of requests to trace", fix="give a number from 0 to 1")
    text = environment.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or environment.get("OTEL_EXPORTER_OTLP_HEADERS", "")
    headers = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    return TraceOptions(
        url,
        ratio,
        environment.get("OTEL_SERVICE_NAME", "") or "remora-agent",
        {name.strip(): unquote(value.strip()) for name, value in headers.items()},
    )


def _ratio(text: str) -> float:
    try:
        return float(text) if text else 1.0
    except ValueError as error:
        raise InvalidArgumentError(
            f"OTEL_TRACES_SAMPLER_ARG={text[:40]!r} is no number", fix="give one from 0 to 1"
        ) from error
