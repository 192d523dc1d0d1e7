"""Rates and latencies between two looks at an agent, and how they are shown."""

from __future__ import annotations

import pytest
from rich.console import Console

from remora.cli import _operator
from remora.cli._usage import load_between, quantile_ms
from remora.cli.top import view
from remora.wire import control_v1 as v1

BOUNDS_S = [0.001, 0.01, 0.1]


def look(time_s: float, requests: int, *, pid: int = 7, tenant: str = "t", device_us: int = 0) -> v1.UsageResponse:
    worker = v1.WorkerStatus(id="w1", pid=8, domain="shared", device="cpu", models=["m"], jobs=1, memory_bytes=10**8)
    return v1.UsageResponse(
        time_s=time_s,
        bounds_s=BOUNDS_S,
        tenants=[
            v1.TenantUsage(
                tenant=tenant,
                requests=requests,
                refusals=requests // 2,
                received_bytes=requests * 100,
                device_us=device_us,
                durations=[0, requests, 0, 0],
                queued=3,
                running=1,
            ),
            v1.TenantUsage(tenant="idle", sessions=1),
        ],
        models=[v1.ModelUsage(operation="infer", model="m", requests=requests, run_us=requests * 5000)],
        devices=[v1.DeviceUsage(device="cpu", busy_us=device_us, memory_bytes=10**7, models=1)],
        status=v1.StatusResponse(version="1", pid=pid, uptime_s=100.0, sessions=2, workers=[worker]),
    )


def test_rates_are_differences_over_the_time_between() -> None:
    load = load_between(look(10.0, 100), look(12.0, 300, device_us=3_000_000))
    tenant, idle = load.tenants
    assert (tenant.requests_per_s, tenant.refusals_per_s, tenant.received_bytes_per_s) == (100.0, 50.0, 10_000.0)
    assert (tenant.device_share, tenant.queued, tenant.running) == (1.0, 3, 1)
    assert 1 < (tenant.p50_ms or 0) < (tenant.p99_ms or 0) <= 10
    assert (idle.requests_per_s, idle.p50_ms) == (0.0, None)
    assert load.models[0].run_ms == 5.0
    assert load.devices[0].busy == 1.5


def test_an_agent_that_was_started_again_and_a_tenant_that_was_forgotten_show_no_negative_rates() -> None:
    again = load_between(look(5000.0, 1000, pid=7), look(10.0, 50, pid=8))
    assert again.tenants[0].requests_per_s == 0.5
    forgotten = load_between(look(10.0, 1000), look(11.0, 30))
    assert forgotten.tenants[0].requests_per_s == 30.0


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [([0, 0, 0, 0], 0.5, None), ([10, 0, 0, 0], 0.5, 0.5), ([0, 0, 10, 0], 1.0, 100.0), ([0, 0, 0, 5], 0.5, 100.0)],
)
def test_a_quantile_lies_in_its_bucket(counts: list[int], share: float, expected: float | None) -> None:
    assert quantile_ms(counts, BOUNDS_S, share) == expected


def test_the_picture_fits_the_terminal_and_takes_names_as_text() -> None:
    crowd = look(12.0, 300)
    crowd.tenants = [v1.TenantUsage(tenant=f"[red]t{number}", sessions=1) for number in range(500)]
    console = Console(width=120, height=30, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - ends with it
    console.print(view(load_between(look(10.0, 100), crowd), rows=30))
    lines = console.export_text().splitlines()
    console.file.close()
    assert len(lines) <= 30
    assert any("[red]t1" in line for line in lines)
    assert any("more" in line for line in lines)


def test_a_narrow_terminal_gets_fewer_columns_and_whole_headings() -> None:
    with open("/dev/null", "w") as nothing:
        console = Console(width=80, height=24, record=True, file=nothing)
        console.print(view(load_between(look(10.0, 100), look(12.0, 300)), rows=24, width=80))
        text = console.export_text()
    for heading in ("TENANT", "REFUSED/S", "P99 MS", "DEVICE", "QUEUE"):
        assert heading in text
    assert "CONN" not in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_345_678, "12.3 MB"), (5e15, "5e+03 TB")]
)
def test_bytes_are_shown_for_people(count: float, shown: str) -> None:
    assert _operator.size(count) == shown
