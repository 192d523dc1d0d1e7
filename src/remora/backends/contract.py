"""What runs inside a worker, as one small contract: bytes become a model, arrays become arrays.

A backend knows nothing of arenas, sockets, tenants or the agent. That is why the demo and the benchmark can run the
very same code in their own process and compare (`catalog.local`), and why a new backend is one module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # the agent shares this module with its workers, and starts 0.1 s sooner without numpy
    import numpy as np

#: Any array: dtypes are data here, checked against the model at run time.
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Spec:
    """One input or output: numpy's dtype name, and -1 in the shape where any size is accepted.

    An empty dtype stands for any type and any shape, where a model's file does not say.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds on what a model file or a picture may ask for."""

    model_bytes: int = 1 << 30
    nodes: int = 100_000
    pixels: int = 64_000_000
    image_bytes: int = 64 << 20


class Stop:
    """Lets another thread end a run. Setting it twice, before, during or after the run is harmless."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self.requested = False

    def attach(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the stop is requested; at once if it was already."""
        with self._lock:
            self._callback = callback
            if self.requested:
                callback()

    def request(self) -> None:
        with self._lock:
            self.requested = True
            if self._callback is not None:
                self._callback()


@dataclass(frozen=True)
class Exposure:
    """Tensors of a model that somebody else may write to while it runs: all that can come of it is wrong numbers.

    That is not so of every tensor: an index that changes after it was checked reads what lies beyond an array.
    """

    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


class LoadedModel(Protocol):
    """A model that is ready to run. `run` may be called from several threads at once."""

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    device: str
    memory_bytes: int
    #: Tensors that may lie in memory which a client writes to; all others are copied. Nothing, unless known better.
    exposure: Exposure

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the outputs to compute.

        Raises:
            InvalidArgumentError: an input is missing, unknown, or has the wrong dtype or shape; an output is unknown.
        """

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[Spec, ...] | None:
        """Return dtype and exact shape of each wanted output, or None when only running tells."""

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        """Compute the wanted outputs, into the given arrays where the backend can.

        Raises:
            CancelledError: `stop` was requested.
            InvalidArgumentError: the model refuses these inputs.
        """


class Backend(Protocol):
    """Turns the bytes of a model file into a model."""

    name: str
    #: Of what runs the models: measurements are kept by it.
    version: str

    def load(self, data: bytes, device: str, limits: Limits, threads: int = 1) -> LoadedModel:
        """Vet and load a model file for `auto`, `cpu` or `cuda:N`; one run on a CPU takes so many threads.

        Raises:
            InvalidArgumentError: the file is no model of this format, or asks for something that is not allowed.
        """
