"""Pose: rows of a place and a score become named points in the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from remora.backends.contract import Limits, LoadedModel, Stop
from remora.backends.vision.pictures import prepare_window
from remora.backends.vision.preprocess import Preprocess
from remora.backends.vision.tables import Table, check_input, finite, need_labels, preprocess_of
from remora.errors import InternalError

_COLUMNS = ("x", "y", "score")


@dataclass(frozen=True)
class PoseFinder:
    """A loaded model with the preprocessing and the rows of points that its manifest describes."""

    model: LoadedModel
    preprocess: Preprocess
    input: str
    output: str
    columns: tuple[int, ...]
    row: int
    unit: str
    points: int

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes. Raises InvalidArgumentError as `Classifier.from_manifest`."""
        how = preprocess_of(manifest, "pose")
        table = Table(manifest, "points", ("input", "output", "columns", "unit"))
        source = table.tensor("input", model.inputs)
        check_input(model, source, how)
        return cls(
            model,
            how,
            source,
            table.tensor("output", model.outputs),
            table.columns("columns", _COLUMNS),
            table.width("columns", _COLUMNS),
            table.choice("unit", ("pixels", "share")),
            need_labels(classes, "pose"),
        )

    def find(self, encoded: bytes | memoryview, most: int, stop: Stop, limits: Limits) -> list[tuple[float, ...]]:
        """Return (point, score, x, y) of the first `most` points, in the model's order, in pixels of the picture."""
        picture, window = prepare_window(encoded, self.preprocess, limits)
        feeds = {self.input: picture}
        answer = self.model.run(feeds, self.model.check(feeds, (self.output,)), stop)[0]
        if answer.size != self.points * self.row:
            raise InternalError(
                f"the model answered with {answer.size} numbers; {self.points} points have {self.points * self.row}"
            )
        rows = finite(answer).reshape(-1, self.row)[:, self.columns]
        if self.unit == "pixels":
            rows[:, :2] /= (self.preprocess.width, self.preprocess.height)
        return [(index, float(score), *window.place(x, y)) for index, (x, y, score) in enumerate(rows[: max(1, most)])]
