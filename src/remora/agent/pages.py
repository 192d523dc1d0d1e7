"""What whoever watches the agent reads over HTTP: /metrics, /healthz, /readyz."""

from __future__ import annotations

from collections.abc import Mapping

from remora.agent.core import Core
from remora.agent.exposition import CONTENT_TYPE
from remora.agent.http import Page, Response

_TEXT = "text/plain; charset=utf-8"


def of_agent(core: Core) -> Mapping[str, Page]:
    def ready() -> Response:
        served, reason = core.ready()
        return 200 if served else 503, _TEXT, f"{reason}\n".encode()

    return {
        "/metrics": lambda: (200, CONTENT_TYPE, core.exposition.text()),
        "/healthz": lambda: (200, _TEXT, b"ok\n"),
        "/readyz": ready,
    }
