"""When a request passed from one stage to the next: the record that metrics and traces are made of.

Whoever moves a request on writes the time down here, and knows nothing of who reads it.
"""

from __future__ import annotations

#: The stages of an operation, in the order in which it passes them.
STAGES = ("queue", "batch", "run", "copy")


class Timings:
    """Times of one request on the monotonic clock, seconds; 0.0 for a moment that did not come."""

    __slots__ = ("arrived_s", "batch_us", "begun_s", "ended_s", "others_us", "run_us")

    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        #: It was handed to a worker.
        self.begun_s = 0.0
        #: The worker's answer was there.
        self.ended_s = 0.0
        #: It waited for others to share a batch with.
        self.batch_us = 0
        #: It ran, as the worker measured it; of a batch, its part.
        self.run_us = 0
        #: The rest of its batch ran.
        self.others_us = 0

    @property
    def queue_us(self) -> int:
        """It waited for its model and for its turn."""
        return max(0, int((self.begun_s - self.arrived_s) * 1e6) - self.batch_us) if self.begun_s else 0

    @property
    def copy_us(self) -> int:
        """It was on the way to the worker and back: inputs placed, messages passed, outputs found."""
        return max(0, int((self.ended_s - self.begun_s) * 1e6) - self.run_us - self.others_us) if self.ended_s else 0

    @property
    def total_us(self) -> int:
        return max(0, int((self.ended_s - self.arrived_s) * 1e6)) if self.ended_s else 0
