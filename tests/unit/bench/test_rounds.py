"""The arithmetic of measurements."""

from __future__ import annotations

from remora.bench.echo import echo
from remora.bench.rounds import Series, alternate, ratio, time_calls


def test_a_ratio_is_the_median_over_rounds_so_one_disturbed_round_does_not_count() -> None:
    measured = Series([[20.0, 20.0], [22.0, 22.0], [900.0, 900.0]])
    yardstick = Series([[10.0], [10.0], [10.0]])
    assert ratio(measured, yardstick) == 2.2


def test_every_candidate_is_measured_in_every_round() -> None:
    steps: list[None] = []
    series = alternate({"a": lambda: None, "b": lambda: None}, rounds=3, seconds=0.001, step=lambda: steps.append(None))
    assert [len(one.rounds) for one in series.values()] == [3, 3]
    assert len(steps) == 6


def test_a_slow_call_is_still_measured_three_times() -> None:
    assert len(time_calls(lambda: None, 0)) == 3


def test_the_echo_yardstick_answers_what_it_was_sent() -> None:
    with echo(64) as round_trip:
        assert len(time_calls(round_trip, 0.01)) > 3
