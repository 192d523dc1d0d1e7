"""Metrics: what Prometheus reads, that it is all documented, and that no tenant can make it grow without bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent_bench import agent_core
from remora.agent import gauges
from remora.agent.core import Core
from remora.agent.exposition import FAMILIES, Exposition
from remora.agent.metrics import MAX_MODELS, MAX_TENANTS, MAX_USES, OTHER, Metrics
from remora.agent.timings import Timings

DOCS = Path(__file__).parents[3] / "docs"


def timings(queue_us: int, run_us: int, copy_us: int, batch_us: int = 0) -> Timings:
    made = Timings(1000.0)
    made.begun_s = 1000.0 + (queue_us + batch_us) / 1e6
    made.ended_s = made.begun_s + (run_us + copy_us) / 1e6
    made.batch_us, made.run_us = batch_us, run_us
    return made


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return values(text)[name, frozenset(labels.items())]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with agent_core(tmp_path) as made:
        gauges.register(made, attachments=lambda: 3, draining=lambda: False)
        yield made


def test_an_operation_is_counted_by_tenant_model_operation_and_stage() -> None:
    metrics = Metrics()
    metrics.answered("native", "Infer", "t", "OK")
    metrics.received("t", 100)
    metrics.ran("t", "infer", "m", timings(200, 2000, 300, 50), device="cpu", sent_bytes=40)
    metrics.refused("t", "limits.x")
    text = Exposition(metrics).text().decode()
    assert value(text, "remora_requests_total", door="native", method="Infer", tenant="t", code="OK") == 1
    assert value(text, "remora_refusals_total", tenant="t", rule="limits.x") == 1
    assert value(text, "remora_received_bytes_total", tenant="t") == 100
    assert value(text, "remora_sent_bytes_total", tenant="t") == 40
    assert value(text, "remora_device_busy_seconds_total", tenant="t", device="cpu") == pytest.approx(0.002)
    assert value(text, "remora_operation_seconds_sum", tenant="t") == pytest.approx(0.00255, abs=2e-6)
    of = {"operation": "infer", "model": "m"}
    for stage, spent_s in (("queue", 0.0002), ("batch", 0.00005), ("run", 0.002), ("copy", 0.0003)):
        for name, labels in (("remora_stage_seconds", of), ("remora_tenant_stage_seconds", {"tenant": "t", **of})):
            assert value(text, f"{name}_sum", stage=stage, **labels) == pytest.approx(spent_s, abs=2e-6)
            assert value(text, f"{name}_count", stage=stage, **labels) == 1
    assert value(text, "remora_stage_seconds_bucket", stage="run", le="0.0025", **of) == 1
    assert value(text, "remora_stage_seconds_bucket", stage="run", le="0.001", **of) == 0


def test_of_a_batch_a_request_has_its_own_part_and_the_rest_is_no_copying() -> None:
    metrics = Metrics()
    shared = timings(100, 2000, 6300)
    shared.others_us = 6000
    metrics.ran("t", "infer", "m", shared)
    text = Exposition(metrics).text().decode()
    for stage, spent_s in (("run", 0.002), ("copy", 0.0003)):
        found = value(text, "remora_stage_seconds_sum", operation="infer", model="m", stage=stage)
        assert found == pytest.approx(spent_s, abs=2e-6)


def test_tenants_who_are_all_here_are_counted_as_others_beyond_the_bound() -> None:
    metrics = Metrics()
    for number in range(10 * MAX_TENANTS):
        metrics.answered("native", "Infer", f"tenant-{number}", "OK")
    assert len(metrics.tenants) == MAX_TENANTS
    text = Exposition(metrics).text().decode()
    counted = value(text, "remora_requests_total", door="native", method="Infer", tenant=OTHER, code="OK")
    assert counted == 9 * MAX_TENANTS


def test_a_tenant_who_left_makes_room_for_one_who_comes() -> None:
    metrics = Metrics()
    for number in range(MAX_TENANTS):
        metrics.answered("native", "Infer", f"tenant-{number}", "OK")
    metrics.left("tenant-7")
    metrics.left("tenant-8")
    metrics.came("tenant-7")  # it is back, and keeps its counters
    metrics.answered("native", "Infer", "new", "OK")
    assert metrics.label("new") == "new"
    assert metrics.label("tenant-7") == "tenant-7"
    assert metrics.label("tenant-8") == OTHER


def test_models_that_come_and_go_do_not_make_the_metrics_grow_without_bound() -> None:
    metrics = Metrics()
    for number in range(4 * MAX_USES):
        metrics.ran("t", "infer", f"sha256:{number:064x}"[::-1] if number % 2 else f"m{number}", timings(1, 1, 1))
        metrics.ran("u", "infer", f"sha256:{number:x}{'0' * 60}", timings(1, 1, 1))
    uses = sum(len(counts.uses) for counts in metrics.tenants.values())
    assert uses <= MAX_USES + 4
    assert len(metrics.stages) <= MAX_MODELS + 2
    for number in range(5000):
        metrics.answered("native", f"method-{number}", "t", "OK")
        metrics.refused("t", f"rule-{number}")
    text = Exposition(metrics).text().decode()
    assert len(text.splitlines()) < 12_000
    assert value(text, "remora_refusals_total", tenant="t", rule=OTHER) > 4000


def test_an_agent_shows_exactly_the_metrics_that_are_listed(core: Core) -> None:
    core.metrics.answered("native", "Infer", "t", "OK")
    shown = {family.name for family in text_string_to_metric_families(core.exposition.text().decode())}
    assert shown == {name.removesuffix("_total") for name in FAMILIES}


def test_gauges_of_tenants_without_series_of_their_own_are_added_up(core: Core) -> None:
    core.metrics.answered("native", "Infer", "known", "OK")
    core.sessions.per_tenant.update({"known": 2, "a": 3, "b": 4})
    text = core.exposition.text().decode()
    assert value(text, "remora_sessions", tenant="known") == 2
    assert value(text, "remora_sessions", tenant=OTHER) == 7
    assert value(text, "remora_attachments") == 3


def test_any_name_is_written_as_prometheus_reads_it() -> None:
    odd = 'a"b\\c\nd}e,f=g'
    metrics = Metrics()
    metrics.refused(odd, "r")
    assert value(Exposition(metrics).text().decode(), "remora_refusals_total", tenant=odd, rule="r") == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_names_follow_prometheus_conventions(name: str) -> None:
    kind, labels = FAMILIES[name].kind, FAMILIES[name].labels
    assert re.fullmatch(r"remora_[a-z_]+", name)
    assert name.endswith("_total") == (kind == "counter")
    if kind in ("histogram", "summary"):
        assert name.endswith("_seconds")
    assert not set(labels) & {"le", "quantile", "job", "instance"}
    assert not re.search(r"_(ms|us|mb|kb|count|sum|bucket)$", name)


def test_the_documentation_lists_every_metric_with_its_kind_and_labels() -> None:
    rows = re.findall(
        r"^\| `(remora_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.+) \|$", (DOCS / "observing.md").read_text(), re.M
    )
    documented = {name: (kind, tuple(filter(None, labels.split(", ")))) for name, kind, labels, _text in rows}
    assert documented == {name: (family.kind, family.labels) for name, family in FAMILIES.items()}
    for name, _kind, _labels, text in rows:
        assert text == FAMILIES[name].text, name
