"""Paths and documents of custom.metrics.k8s.io, as kube-apiserver and its clients ask for them."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.errors import InvalidArgumentError, NotFoundError, RemoraError, UnavailableError
from remora.kube import custom_metrics as v1
from remora.kube.figures import METRICS, Figures

BASE = "/apis/custom.metrics.k8s.io/v1beta2"
FIGURES = Figures(95.0, 29.6, dict.fromkeys(METRICS, 1.25))


def test_discovery_lists_the_group_its_versions_and_its_metrics() -> None:
    group = v1.read("/apis/custom.metrics.k8s.io")
    assert isinstance(group, dict)
    assert group["preferredVersion"] == {"groupVersion": "custom.metrics.k8s.io/v1beta2", "version": "v1beta2"}
    assert v1.read("/apis?timeout=32s") == {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{key: group[key] for key in ("name", "versions", "preferredVersion")}],
    }
    for version in ("v1beta1", "v1beta2"):
        listed = v1.read(f"/apis/custom.metrics.k8s.io/{version}")
        assert isinstance(listed, dict)
        assert listed["groupVersion"] == f"custom.metrics.k8s.io/{version}"
        assert {one["name"] for one in listed["resources"]} == {f"pods/{metric}" for metric in METRICS}
        assert all(one["namespaced"] and one["verbs"] == ["get"] for one in listed["resources"])


def test_the_autoscalers_question_is_read() -> None:
    target = f"{BASE}/namespaces/prod/pods/%2A/remora_inflight_requests?labelSelector=app%3Dweb%2Ctier%21%3Dx"
    assert v1.read(target) == v1.Query("v1beta2", "prod", "*", "remora_inflight_requests", "app=web,tier!=x")


def test_an_answer_has_each_pods_value_time_and_window() -> None:
    query = v1.Query("v1beta2", "prod", "*", "remora_inflight_requests")
    assert v1.values(query, [("web-1", FIGURES)], 1_700_000_005.0, 100.0) == {
        "kind": "MetricValueList",
        "apiVersion": "custom.metrics.k8s.io/v1beta2",
        "metadata": {},
        "items": [
            {
                "describedObject": {"kind": "Pod", "apiVersion": "/v1", "namespace": "prod", "name": "web-1"},
                "metric": {"name": "remora_inflight_requests", "selector": None},
                "timestamp": "2023-11-14T22:13:20Z",
                "windowSeconds": 30,
                "value": "1250m",
            }
        ],
    }
    older = v1.values(v1.Query("v1beta1", "prod", "web-1", "remora_queue_seconds"), [("web-1", FIGURES)], 0.0, 0.0)
    assert older["items"][0]["metricName"] == "remora_queue_seconds"
    assert older["items"][0]["window"] == 30


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (3.0, "3"), (0.25, "250m"), (1e-5, "0"), (12.3456, "12346m"), (1e9, "1000000000")]
)
def test_a_quantity_is_in_thousandths(value: float, text: str) -> None:
    assert v1.quantity(value) == text


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/", NotFoundError),
        ("/openapi/v2", NotFoundError),
        ("/apis/metrics.k8s.io/v1beta1", NotFoundError),
        (f"{BASE}/namespaces/prod/pods/*/cpu", NotFoundError),
        (f"{BASE}/namespaces/prod/services/*/remora_inflight_requests", NotFoundError),
        (f"{BASE}/namespaces/..%2F..%2Fprod/pods/*/remora_inflight_requests", InvalidArgumentError),
        (f"{BASE}/namespaces/prod/pods/A%00/remora_inflight_requests", InvalidArgumentError),
        (f"{BASE}/namespaces/prod/pods/*/remora_inflight_requests?metricLabelSelector=a%3Db", InvalidArgumentError),
        (f"{BASE}/namespaces/prod/pods/*/remora_inflight_requests?labelSelector={'x' * 5000}", InvalidArgumentError),
    ],
)
def test_what_is_not_served_is_an_error_that_names_what_is(target: str, error: type[RemoraError]) -> None:
    with pytest.raises(error):
        v1.read(target)


@given(st.text(max_size=200))
def test_any_target_is_answered_or_refused(target: str) -> None:
    with suppress(NotFoundError, InvalidArgumentError):
        v1.read(f"/{target}")


@pytest.mark.parametrize(
    ("error", "status"), [(NotFoundError("x"), 404), (InvalidArgumentError("x"), 400), (UnavailableError("x"), 503)]
)
def test_an_error_is_a_status_of_kubernetes(error: RemoraError, status: int) -> None:
    code, kind, body = v1.failure(error)
    assert (code, kind) == (status, "application/json")
    assert {"kind": "Status", "status": "Failure", "code": status}.items() <= json.loads(body).items()
