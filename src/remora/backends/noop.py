"""A backend that computes nothing: what is left of a request's time is the cost of the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remora.backends.contract import Array, Limits, Spec, Stop


class NoopModel:
    """Has no inputs and no outputs, and answers at once."""

    inputs: tuple[Spec, ...] = ()
    outputs: tuple[Spec, ...] = ()
    device = "cpu"
    memory_bytes = 0

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        return ()

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[Spec, ...]:
        return ()

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        return ()


class NoopBackend:
    """Any bytes are a model that does nothing."""

    name = "noop"

    def load(self, data: bytes, device: str, limits: Limits, threads: int = 1) -> NoopModel:
        return NoopModel()
