"""Segmentation and depth: the answer is a picture, too, one number for each place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictured import Pictured, parts
from remora.backends.vision.preprocess import Preprocess
from remora.backends.vision.tables import Table, finite, need_labels, preprocess_of
from remora.errors import InternalError, InvalidArgumentError


def _whole(manifest: Mapping[str, Any], task: str) -> Preprocess:
    """Return the `[preprocess]` table, which must show the model the whole picture and nothing else."""
    how = preprocess_of(manifest, task)
    if how.crop != "none":
        raise InvalidArgumentError(
            f"[preprocess] crop is {how.crop!r}, but the map of {task} stands for the whole picture",
            fix='write crop = "none"',
        )
    return how


@dataclass(frozen=True)
class _Mapper(Pictured):
    """Its output is a map, as the manifest describes it."""

    layout: str

    def _planes(self, answer: Array) -> Array:
        """Return the model's answer as [channels, height, width]."""
        if answer.ndim == 4 and len(answer) == 1:
            answer = answer[0] if self.layout == "nchw" else answer[0].transpose(2, 0, 1)
        elif answer.ndim == 2:  # neither batch nor channels; of three dimensions the first is either
            answer = answer[np.newaxis]
        if answer.ndim != 3 or not answer.size:
            raise InternalError(f"the model answered with the shape {list(answer.shape)}, which is no map")
        return finite(answer)


@dataclass(frozen=True)
class Segmenter(_Mapper):
    """Gives each place the number of a label."""

    activation: str
    threshold: float
    classes: int

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes. Raises InvalidArgumentError as `Classifier.from_manifest`."""
        how = _whole(manifest, "segmentation")
        table = Table(manifest, "map", ("input", "output", "layout", "activation", "threshold"))
        return cls(
            *parts(model, how, table),
            table.choice("layout", (how.layout, "nchw", "nhwc")),
            table.choice("activation", ("none", "sigmoid")),
            table.share("threshold", 0.5),
            need_labels(classes, "segmentation", 2),
        )

    def map(self, encoded: bytes | memoryview, stop: Stop, limits: Limits) -> Array:
        """Return the number of the label for each place, uint8 [height, width] of the model's own size.

        A model with one channel gives the probability of the second label against the first.
        """
        return self.read(self.answer(encoded, stop, limits)[0])

    def read(self, answer: Array) -> Array:
        """Return what `map` returns, of the model's answer to one picture."""
        planes = self._planes(answer)
        if len(planes) != self.classes and not (len(planes) == 1 and self.classes == 2):
            raise InternalError(f"the model answered with {len(planes)} channels for {self.classes} labels")
        mask: Array
        if len(planes) > 1:
            mask = planes.argmax(axis=0)
        else:
            scores = 1 / (1 + np.exp(-planes[0])) if self.activation == "sigmoid" else planes[0]
            mask = scores >= self.threshold
        return np.ascontiguousarray(mask, np.uint8)


@dataclass(frozen=True)
class DepthFinder(_Mapper):
    """Gives each place a distance, in whatever unit the model was trained for."""

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes. Raises InvalidArgumentError as `Classifier.from_manifest`."""
        how = _whole(manifest, "depth")
        table = Table(manifest, "map", ("input", "output", "layout"))
        return cls(*parts(model, how, table), table.choice("layout", (how.layout, "nchw", "nhwc")))

    def map(self, encoded: bytes | memoryview, stop: Stop, limits: Limits) -> Array:
        """Return the depth of each place, float32 [height, width] of the model's own size."""
        return self.read(self.answer(encoded, stop, limits)[0])

    def read(self, answer: Array) -> Array:
        """Return what `map` returns, of the model's answer to one picture."""
        planes = self._planes(answer)
        if len(planes) != 1:
            raise InternalError(f"the model answered with {len(planes)} channels, depth has one")
        return np.ascontiguousarray(planes[0], np.float32)
