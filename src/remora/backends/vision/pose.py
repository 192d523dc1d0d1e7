"""Pose: rows of a place and a score become named points in the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictured import Pictured, parts
from remora.backends.vision.pictures import Window
from remora.backends.vision.tables import Table, finite, need_labels, preprocess_of
from remora.errors import InternalError

_COLUMNS = ("x", "y", "score")


@dataclass(frozen=True)
class PoseFinder(Pictured):
    """Its output holds rows of points, as the manifest describes them."""

    columns: tuple[int, ...]
    row: int
    unit: str
    points: int

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes. Raises InvalidArgumentError as `Classifier.from_manifest`."""
        how = preprocess_of(manifest, "pose")
        table = Table(manifest, "points", ("input", "output", "columns", "unit"))
        return cls(
            *parts(model, how, table),
            table.columns("columns", _COLUMNS),
            table.width("columns", _COLUMNS),
            table.choice("unit", ("pixels", "share")),
            need_labels(classes, "pose"),
        )

    def find(self, encoded: bytes | memoryview, most: int, stop: Stop, limits: Limits) -> list[tuple[float, ...]]:
        """Return (point, score, x, y) of the first `most` points, in the model's order, in pixels of the picture."""
        return self.read(*self.answer(encoded, stop, limits), most)

    def read(self, answer: Array, window: Window, most: int) -> list[tuple[float, ...]]:
        """Return what `find` returns, of the model's answer to one picture."""
        if answer.size != self.points * self.row:
            raise InternalError(
                f"the model answered with {answer.size} numbers; {self.points} points have {self.points * self.row}"
            )
        rows = finite(answer).reshape(-1, self.row)[:, self.columns]
        if self.unit == "pixels":
            rows[:, :2] /= (self.preprocess.width, self.preprocess.height)
        return [(index, float(score), *window.place(x, y)) for index, (x, y, score) in enumerate(rows[: max(1, most)])]
