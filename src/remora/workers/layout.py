"""Where a job's outputs lie inside its block: worked out once per combination of shapes, as it is on every job's way.

Between two jobs a classifier evicts most of the caches, so each avoided Python call saves more than a benchmark of that
call alone shows: remembering layouts took 0.1 ms off a 10 ms job.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from remora.backends.contract import Array, Spec
from remora.wire.remora_v1 import DTYPES
from remora.workers.arena import aligned
from remora.workers.protocol import encode_value


class Layout:
    """Outputs in order, each at a multiple of `ALIGN` from the start of the block."""

    __slots__ = ("encoded", "offsets", "sizes", "specs", "total")

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = tuple(specs)
        self.sizes = tuple(prod(spec.shape) * DTYPES[spec.dtype] for spec in specs)
        offsets, total = [], 0
        for size in self.sizes:
            offsets.append(total)
            total += aligned(size)
        self.offsets = tuple(offsets)
        self.total = total
        #: As answers show it (`packed`).
        self.encoded = encode_value(self.places(0))

    @classmethod
    def of(cls, names: Sequence[str], arrays: Sequence[Array]) -> Layout:
        """Return the layout of outputs that are there already."""
        return cls([Spec(name, array.dtype.name, array.shape) for name, array in zip(names, arrays, strict=True)])

    def fits(self, arrays: Sequence[Array]) -> bool:
        """True if the outputs are what was planned (a model may declare one shape and compute another)."""
        return all(
            array.nbytes == size and array.shape == spec.shape
            for array, size, spec in zip(arrays, self.sizes, self.specs, strict=True)
        )

    def places(self, start: int) -> list[list[object]]:
        """Return the outputs as the protocol describes them, for a block at `start`."""
        return [
            [spec.name, spec.dtype, spec.shape, start + offset, size]
            for spec, offset, size in zip(self.specs, self.offsets, self.sizes, strict=True)
        ]
