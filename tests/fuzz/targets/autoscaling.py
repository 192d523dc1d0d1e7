"""What the aggregated API server reads: targets of requests, and the metrics of agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from remora.errors import InvalidArgumentError, NotFoundError
from remora.kube import custom_metrics, figures


def case(data: bytes) -> None:
    text = data.decode("latin-1")
    with suppress(NotFoundError, InvalidArgumentError):
        custom_metrics.read(text)
    windows = figures.Windows(10.0, 10.0)
    for at_s in (0.0, 5.0):
        windows.add("agent", at_s, figures.parse(text))
    for pod in figures.parse(text):
        windows.figures(pod, 5.0)


def seeds() -> Iterator[bytes]:
    yield b"/apis/custom.metrics.k8s.io/v1beta2/namespaces/prod/pods/*/remora_inflight_requests?labelSelector=app%3Dweb"
    yield b"/apis/custom.metrics.k8s.io?timeout=32s"
    yield b'remora_pod_operations_total{namespace="prod",pod="web-1"} 12\nremora_pod_in_flight_requests{pod="a"} 1'
