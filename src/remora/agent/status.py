"""Asking a running agent how it is, through its control socket, and showing the answer."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, TypeVar

from remora.errors import PermissionDeniedError, UnavailableError, UnimplementedError
from remora.wire import control_v1 as v1
from remora.wire import health_v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client

TIMEOUT_S = 10.0

M = TypeVar("M", bound=Message)


def ask(control: Path) -> v1.StatusResponse:
    """Ask for the status. Raises as `call`."""
    return call(control, "Status", v1.Empty(), v1.StatusResponse, timeout_s=TIMEOUT_S)


def health(control: Path) -> str:
    """Ask the health service whether a new request would be served. Raises as `call`."""
    try:
        answer = call(
            control,
            "Check",
            health_v1.CheckRequest(),
            health_v1.CheckResponse,
            timeout_s=TIMEOUT_S,
            service=health_v1.SERVICE,
        )
    except UnimplementedError:  # an agent of an earlier version
        return health_v1.STATES[0]
    return health_v1.STATES.get(answer.status, health_v1.STATES[0])


def call(
    control: Path,
    method: str,
    request: Message,
    answer: type[M],
    *,
    timeout_s: float | None = TIMEOUT_S,
    service: str = v1.SERVICE,
) -> M:
    """Make one call on an agent's control socket.

    Raises:
        UnavailableError: no agent answers there.
        PermissionDeniedError: it belongs to another user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(control))
    except PermissionError as error:
        sock.close()
        raise PermissionDeniedError(
            f"the control socket {control} belongs to another user", fix="ask as the agent's user or as root"
        ) from error
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"no agent answers at {control}: {error.strerror or error}",
            fix="start one with `remora agent`, or give its --control PATH",
        ) from error
    with Client(sock) as client:
        return client.call(service, method, request, answer, timeout_s=timeout_s)


def as_dict(answer: v1.StatusResponse, state: str) -> dict[str, Any]:
    """Return the answer as JSON has it."""
    workers = [
        {
            "id": worker.id,
            "pid": worker.pid,
            "domain": worker.domain,
            "backend": worker.backend,
            "models": list(worker.models),
            "busy": worker.busy,
            "restarts": worker.restarts,
            "device": worker.device,
            "memory_bytes": worker.memory_bytes,
            "jobs": worker.jobs,
        }
        for worker in answer.workers
    ]
    return {
        "version": answer.version,
        "pid": answer.pid,
        "health": state,
        "uptime_s": round(answer.uptime_s, 3),
        "listeners": list(answer.listeners),
        "sessions": answer.sessions,
        "connections": answer.connections,
        "store_bytes": answer.store_bytes,
        "metrics_address": answer.metrics_address,
        "workers": workers,
    }


def as_lines(answer: v1.StatusResponse, state: str) -> list[str]:
    """Return the answer for people."""
    lines = [
        f"remora agent {answer.version}, pid {answer.pid}, up {answer.uptime_s:.0f} s, {state}",
        f"listens on   {', '.join(answer.listeners) or 'nothing but attached sandboxes'}",
        f"metrics      {answer.metrics_address or 'off'}",
        f"sessions     {answer.sessions}, connections {answer.connections}, store {answer.store_bytes / 1e6:.1f} MB",
    ]
    for worker in answer.workers:
        models = ", ".join(worker.models) or "no model"
        lines.append(
            f"worker       {worker.id}: pid {worker.pid}, {worker.domain}, {worker.backend} on {worker.device}, "
            f"{models}, {'busy' if worker.busy else 'idle'}, {worker.restarts} restarts"
        )
    return lines
