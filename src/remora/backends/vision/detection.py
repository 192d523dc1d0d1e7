"""Detection: rows of corners, score and class become boxes in the picture, one per object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictured import Pictured, parts
from remora.backends.vision.pictures import Window
from remora.backends.vision.tables import Table, finite, need_labels, preprocess_of
from remora.errors import InternalError

_COLUMNS = ("x1", "y1", "x2", "y2", "score", "class")
_KEYS = ("input", "output", "columns", "unit", "threshold", "overlap")


def suppress(rows: Array, overlap: float) -> Array:
    """Keep the best of the boxes of one class that lie over one another.

    Args:
        rows: [N, 6]: x1, y1, x2, y2, score, class.
        overlap: Share of two boxes' union that their intersection may have.
    """
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    kept: list[Array] = []
    while len(rows):
        best, rows = rows[0], rows[1:]
        kept.append(best)
        least, most = np.maximum(rows[:, :2], best[:2]), np.minimum(rows[:, 2:4], best[2:4])
        common = np.clip(most - least, 0, None).prod(axis=1)
        union = (rows[:, 2:4] - rows[:, :2]).prod(axis=1) + (best[2:4] - best[:2]).prod() - common
        rows = rows[(rows[:, 5] != best[5]) | (common <= overlap * union)]
    return np.array(kept).reshape(-1, 6)


@dataclass(frozen=True)
class Detector(Pictured):
    """Its output holds rows of boxes, as the manifest describes them."""

    columns: tuple[int, ...]
    row: int
    unit: str
    threshold: float
    overlap: float
    classes: int

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes. Raises InvalidArgumentError as `Classifier.from_manifest`."""
        how = preprocess_of(manifest, "detection")
        table = Table(manifest, "boxes", _KEYS)
        return cls(
            *parts(model, how, table),
            table.columns("columns", _COLUMNS),
            table.width("columns", _COLUMNS),
            table.choice("unit", ("pixels", "share")),
            table.share("threshold", 0.3),
            table.share("overlap", 0.4),
            need_labels(classes, "detection"),
        )

    def find(self, encoded: bytes | memoryview, most: int, stop: Stop, limits: Limits) -> list[tuple[float, ...]]:
        """Return (class, score, x1, y1, x2, y2) of the best objects, best first, in pixels of the picture."""
        return self.read(*self.answer(encoded, stop, limits), most)

    def read(self, answer: Array, window: Window, most: int) -> list[tuple[float, ...]]:
        """Return what `find` returns, of the model's answer to one picture."""
        if answer.size % self.row:
            raise InternalError(f"the model answered with {answer.size} numbers, a row has {self.row}")
        rows = finite(answer).reshape(-1, self.row)[:, self.columns]
        rows = rows[(rows[:, 4] >= self.threshold) & (rows[:, 5] >= 0) & (rows[:, 5] < self.classes)]
        if self.unit == "pixels":
            rows[:, :4] /= (self.preprocess.width, self.preprocess.height) * 2
        return [
            (int(row[5]), float(row[4]), *window.place(row[0], row[1]), *window.place(row[2], row[3]))
            for row in suppress(rows, self.overlap)[: max(1, most)]
        ]
