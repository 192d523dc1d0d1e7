"""Figures of pods out of agents' counters, over windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.pod_counts import POD_FAMILIES
from remora.kube.figures import METRICS, Counts, Figures, Windows, parse

WEB = ("prod", "web-1.x")


def text(namespace: str, pod: str, *numbers: float) -> str:
    lines = [
        f'{name}{{namespace="{namespace}",pod="{pod}"}} {number}'
        for name, number in zip(POD_FAMILIES, numbers, strict=True)
    ]
    return "\n".join(["# TYPE x gauge", *lines, 'remora_sessions{tenant="sandbox:prod.web-1"} 3', ""])


def test_what_an_agent_says_of_its_pods_is_read_and_the_rest_passed_over() -> None:
    assert parse(text(*WEB, 3, 10, 0.5, 1e-05)) == {WEB: (3.0, 10.0, 0.5, 1e-05)}


@given(st.text(max_size=300))
def test_any_text_is_read_without_an_error(garbage: str) -> None:
    parse(garbage)
    parse(f'remora_pod_operations_total{{namespace="a",pod="b"}} {garbage}')


def test_a_pods_name_that_is_none_is_passed_over() -> None:
    assert parse('remora_pod_operations_total{namespace="a",pod="b\\"} 1\nx{pod="c"} 1') == {}


def figures(windows: Windows, now_s: float) -> Figures:
    found = windows.figures(WEB, now_s)
    assert found is not None
    assert set(found.values) == set(METRICS)
    return found


def test_rates_are_of_the_window_and_what_is_in_flight_is_its_mean() -> None:
    windows = Windows(10.0, 15.0)
    for at_s, counts in enumerate([(0, 0, 0, 0), (2, 50, 5.0, 1.0), (4, 100, 10.0, 2.0)]):
        windows.add("a", at_s * 5.0, {WEB: counts})
    found = figures(windows, 10.0)
    assert found.window_s == 10.0
    assert found.values == {
        "remora_inflight_requests": 3.0,
        "remora_requests_per_second": 10.0,
        "remora_device_seconds_per_second": 0.2,
        "remora_queue_seconds": 0.1,
    }


def test_what_was_before_the_window_counts_no_more() -> None:
    windows = Windows(10.0, 15.0)
    for at_s in range(0, 60, 5):
        windows.add("a", float(at_s), {WEB: (8.0 if at_s < 40 else 0.0, min(at_s, 40) * 10.0, 0.0, 0.0)})
    found = figures(windows, 55.0)
    assert found.window_s == 10.0
    assert found.values["remora_requests_per_second"] == 0.0
    assert found.values["remora_inflight_requests"] == 0.0


def test_a_counter_that_went_down_began_anew() -> None:
    windows = Windows(30.0, 15.0)
    for at_s, operations in ((0.0, 1000.0), (5.0, 20.0), (10.0, 30.0)):
        windows.add("a", at_s, {WEB: (0.0, operations, 0.0, 0.0)})
    assert figures(windows, 10.0).values["remora_requests_per_second"] == 3.0


def test_a_pod_that_comes_has_done_everything_since_the_last_look() -> None:
    windows = Windows(30.0, 15.0)
    windows.add("a", 0.0, {})
    windows.add("a", 5.0, {WEB: (1.0, 10.0, 0.0, 0.0)})
    assert figures(windows, 5.0).values["remora_requests_per_second"] == 2.0


def test_nothing_is_said_of_a_pod_after_one_look_or_when_its_agent_is_silent_or_gone() -> None:
    windows = Windows(30.0, 15.0)
    counts: Counts = (1.0, 1.0, 0.0, 0.0)
    windows.add("a", 0.0, {WEB: counts})
    assert windows.figures(WEB, 0.0) is None
    windows.add("a", 5.0, {WEB: counts})
    assert windows.figures(WEB, 6.0) is not None
    assert windows.figures(WEB, 21.0) is None
    windows.keep({"b"})
    assert windows.figures(WEB, 6.0) is None


def test_after_a_silence_nothing_old_is_counted() -> None:
    windows = Windows(30.0, 15.0)
    windows.add("a", 0.0, {WEB: (0.0, 0.0, 0.0, 0.0)})
    windows.add("a", 100.0, {WEB: (0.0, 1e6, 0.0, 0.0)})
    assert windows.figures(WEB, 100.0) is None


def test_a_pod_that_two_agents_name_is_where_it_was_seen_last() -> None:
    windows = Windows(30.0, 15.0)
    for agent, at_s, operations in (("old", 0.0, 0.0), ("old", 5.0, 50.0), ("new", 1.0, 0.0), ("new", 6.0, 5.0)):
        windows.add(agent, at_s, {WEB: (0.0, operations, 0.0, 0.0)})
    assert figures(windows, 6.0).values["remora_requests_per_second"] == 1.0


@pytest.mark.parametrize("at_s", [0.0, 5.0])
def test_another_pod_has_no_figures(at_s: float) -> None:
    windows = Windows(30.0, 15.0)
    windows.add("a", at_s, {WEB: (1.0, 1.0, 0.0, 0.0)})
    assert windows.figures(("test", "web-1.x"), at_s) is None
