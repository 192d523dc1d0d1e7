"""The custom metrics API, `custom.metrics.k8s.io`, as far as a HorizontalPodAutoscaler asks: discovery, and figures of
pods. Pure: a request's target in, a document out.

Sources: https://github.com/kubernetes/metrics/tree/master/pkg/apis/custom_metrics (v1beta1, v1beta2);
https://github.com/kubernetes/design-proposals-archive/blob/main/instrumentation/custom-metrics-api.md (paths).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from remora.errors import InvalidArgumentError, NotFoundError, RemoraError
from remora.kube.figures import METRICS, Figures

GROUP = "custom.metrics.k8s.io"
#: The one to prefer first. Autoscalers from Kubernetes 1.8 to 1.11 know the second only.
VERSIONS = ("v1beta2", "v1beta1")
JSON = "application/json"
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_POD = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_REASONS = {400: "BadRequest", 404: "NotFound", 500: "InternalError", 503: "ServiceUnavailable"}
#: A selector as long as this is a mistake or an attack.
_MOST_SELECTOR = 4096


@dataclass(frozen=True, slots=True)
class Query:
    """Asks for one figure of some pods: of one by `name`, or (`*`) of those that `selector` matches."""

    version: str
    namespace: str
    name: str
    metric: str
    selector: str = ""


def read(target: str) -> Mapping[str, Any] | Query:
    """Return what a target asks for: a discovery document, or a query.

    Raises:
        NotFoundError, InvalidArgumentError: there is no such thing here; says what there is.
    """
    place = urlsplit(target)
    parts = [unquote(part) for part in place.path.strip("/").split("/")]
    match parts:
        case ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group()]}
        case ["apis", group] if group == GROUP:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group()}
        case ["apis", group, version] if group == GROUP and version in VERSIONS:
            return _resources(version)
        case ["apis", group, version, "namespaces", namespace, "pods", name, metric] if (
            group == GROUP and version in VERSIONS
        ):
            return _query(version, namespace, name, metric, parse_qs(place.query))
    raise NotFoundError(
        f"there is nothing at {place.path[:200]!r}",
        fix=f"ask /apis/{GROUP}/{VERSIONS[0]}/namespaces/NAMESPACE/pods/*/METRIC",
    )


def _query(version: str, namespace: str, name: str, metric: str, given: Mapping[str, list[str]]) -> Query:
    if metric not in METRICS:
        raise NotFoundError(f"there is no metric {metric[:80]!r} of pods", fix=f"the metrics are {', '.join(METRICS)}")
    if not _NAMESPACE.fullmatch(namespace) or (name != "*" and not _POD.fullmatch(name)):
        raise InvalidArgumentError(f"{namespace[:80]!r} and {name[:80]!r} are no names of a namespace and a pod")
    if given.get("metricLabelSelector", [""])[0]:
        raise InvalidArgumentError("these metrics have no labels to select by", fix="leave metric.selector out")
    selector = given.get("labelSelector", [""])[0]
    if len(selector) > _MOST_SELECTOR:
        raise InvalidArgumentError(f"the selector has {len(selector)} characters; {_MOST_SELECTOR} are allowed")
    return Query(version, namespace, name, metric, selector)


def _group() -> dict[str, Any]:
    versions = [{"groupVersion": f"{GROUP}/{version}", "version": version} for version in VERSIONS]
    return {"name": GROUP, "versions": versions, "preferredVersion": versions[0]}


def _resources(version: str) -> Mapping[str, Any]:
    listed = [
        {"name": f"pods/{metric}", "singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
        for metric in METRICS
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": f"{GROUP}/{version}", "resources": listed}


def values(query: Query, found: Iterable[tuple[str, Figures]], wall_s: float, now_s: float) -> Mapping[str, Any]:
    """Return the answer to a query. Pods without figures are left out: the autoscaler is careful with those it misses.

    Args:
        wall_s: Seconds since the epoch, at the moment that the figures' clock calls `now_s`.
    """
    items = []
    for pod, figures in found:
        at = datetime.fromtimestamp(wall_s - (now_s - figures.at_s), UTC)
        item: dict[str, Any] = {
            "describedObject": {"kind": "Pod", "apiVersion": "/v1", "namespace": query.namespace, "name": pod},
            "timestamp": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "value": quantity(figures.values[query.metric]),
        }
        if query.version == "v1beta1":
            item |= {"metricName": query.metric, "window": round(figures.window_s), "selector": None}
        else:
            item |= {"metric": {"name": query.metric, "selector": None}, "windowSeconds": round(figures.window_s)}
        items.append(item)
    kind = {"kind": "MetricValueList", "apiVersion": f"{GROUP}/{query.version}"}
    return {**kind, "metadata": {}, "items": items}


def quantity(value: float) -> str:
    """Return a number as Kubernetes writes quantities, in thousandths: what an autoscaler counts in."""
    thousandths = round(value * 1000)
    return str(thousandths // 1000) if thousandths % 1000 == 0 else f"{thousandths}m"


def encoded(document: Mapping[str, Any]) -> tuple[int, str, bytes]:
    return 200, JSON, json.dumps(document, separators=(",", ":")).encode()


def failure(error: RemoraError) -> tuple[int, str, bytes]:
    """Return an error as Kubernetes' clients read them."""
    status = {NotFoundError.code: 404, InvalidArgumentError.code: 400}.get(error.code, 503)
    document = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(error)[:1000],
        "reason": _REASONS[status],
        "code": status,
    }
    return status, JSON, json.dumps(document).encode()
