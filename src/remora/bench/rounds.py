"""Samples, rounds and ratios: the arithmetic of a measurement, free of what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Series:
    """Durations of one candidate, microseconds, a list for each round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return [sample for one in self.rounds for sample in one]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples)

    def as_json(self) -> dict[str, float | int]:
        ordered = sorted(self.samples)
        return {
            "median_us": round(self.median_us, 2),
            "p95_us": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
            "min_us": round(ordered[0], 2),
            "samples": len(ordered),
        }


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Call for about `seconds`, at least three times; returns each duration in microseconds."""
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < end:
        begin = time.perf_counter_ns()
        call()
        durations.append((time.perf_counter_ns() - begin) / 1000)
    return durations


def alternate(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float, step: Callable[[], None]
) -> dict[str, Series]:
    """Measure all candidates once a round, one after the other; `step` is called after each for a progress bar."""
    series = {name: Series() for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            series[name].rounds.append(time_calls(call, seconds))
            step()
    return series


def ratio(measured: Series, yardstick: Series) -> float:
    """Return the median over rounds of measured median / yardstick median."""
    return statistics.median(
        statistics.median(ours) / statistics.median(theirs)
        for ours, theirs in zip(measured.rounds, yardstick.rounds, strict=True)
    )
