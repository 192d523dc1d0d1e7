"""How long a model's runs take, learnt from every run: what a request costs, and what a batch of some size would take.

Pure arithmetic over measurements; time comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What a run of a model that never ran is expected to cost.
_FIRST_GUESS_US = 1000.0
#: Weight of the newest measurement.
_SMOOTHING = 0.2
#: An estimate older than this, and than ten times itself, refuses nobody: the next run shows what is true now.
_STALE_S = 1.0


class RunTimes:
    """Of one model in one worker."""

    __slots__ = ("_deviation_us", "_measured_s", "_points", "_runs", "estimate_us", "share_us")

    def __init__(self) -> None:
        #: A run, whatever its size.
        self.estimate_us = _FIRST_GUESS_US
        #: One request's part of a run: what it is charged before it is known.
        self.share_us = _FIRST_GUESS_US
        self._deviation_us = 0.0
        self._measured_s = 0.0
        self._runs = 0
        #: Rows of a run, by powers of two -> (rows, microseconds), both smoothed.
        self._points: dict[int, tuple[float, float]] = {}

    def learn(self, run_us: float, rows: int, requests: int, now_s: float) -> None:
        """Take in a run that took `run_us` for some rows of some requests."""
        off = run_us - self.estimate_us
        # The first run says more than the guess, though it may be a slow one.
        weight = _SMOOTHING if self._runs else 1.0
        self.estimate_us += weight * off
        self.share_us += weight * (run_us / max(1, requests) - self.share_us)
        self._deviation_us += _SMOOTHING * (abs(off) - self._deviation_us) if self._runs else 0.0
        self._runs += 1
        self._measured_s = now_s
        self._note(rows, run_us)

    def seed(self, curve: Mapping[int, float]) -> None:
        """Start from a measurement that was made before: rows -> microseconds."""
        for rows, run_us in curve.items():
            self._points.setdefault(rows.bit_length(), (float(rows), run_us))

    def _note(self, rows: int, run_us: float) -> None:
        size = rows.bit_length()
        known = self._points.get(size)
        if known is None:
            self._points[size] = (float(rows), run_us)
        else:
            old_rows, old_us = known
            self._points[size] = (
                old_rows + _SMOOTHING * (rows - old_rows),
                old_us + _SMOOTHING * (run_us - old_us),
            )

    def of_rows_us(self, rows: int) -> float:
        """Return what a run of so many rows is expected to take; 0 if nothing is known.

        Beyond the largest size that ran, twice that size is expected to take no longer: if nobody hoped so, nobody
        would find out. From there on it grows with the rows.
        """
        below, above = (0.0, 0.0), (0.0, 0.0)
        for at, run_us in self._points.values():
            if at <= rows and at >= below[0]:
                below = at, run_us
            if at >= rows and (not above[0] or at < above[0]):
                above = at, run_us
        if not above[0]:
            largest, run_us = below
            return run_us * max(1.0, rows / (2 * largest)) if largest else 0.0
        if not below[0] or above[0] == below[0]:
            return above[1]
        part = (rows - below[0]) / (above[0] - below[0])
        return below[1] + part * (above[1] - below[1])

    def least_us(self, now_s: float) -> float:
        """Return how long a run takes at least, as far as that is known; 0 if it is not."""
        age_s = now_s - self._measured_s
        if self._runs < 3 or (age_s > _STALE_S and age_s > self.estimate_us / 1e5):
            return 0.0
        return max(0.0, self.estimate_us - 2 * self._deviation_us)
