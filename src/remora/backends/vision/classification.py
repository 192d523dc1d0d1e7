"""Classification: scores become a ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictured import Pictured, parts
from remora.backends.vision.pictures import Window
from remora.backends.vision.tables import Table, finite, preprocess_of


def rank(scores: Array, top: int, activation: str = "softmax") -> list[tuple[int, float]]:
    """Return (class, probability) of the `top` best classes, best first."""
    flat = finite(scores).reshape(-1)
    if activation == "softmax":
        powers = np.exp(flat - flat.max())
        flat = powers / powers.sum()
    order = np.argsort(-flat, kind="stable")[: max(1, top)]
    return [(int(index), float(flat[index])) for index in order]


@dataclass(frozen=True)
class Classifier(Pictured):
    """Its output holds a score for each class."""

    activation: str = "softmax"

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes.

        Raises:
            InvalidArgumentError: the model cannot classify, or the manifest names what it does not have.
        """
        how = preprocess_of(manifest, "classification")
        table = Table(manifest, "scores", ("input", "output", "activation"))
        return cls(*parts(model, how, table), table.choice("activation", ("softmax", "none")))

    def find(self, encoded: bytes | memoryview, most: int, stop: Stop, limits: Limits) -> list[tuple[int, float]]:
        """Return (class, probability) of the best classes, best first."""
        return self.read(*self.answer(encoded, stop, limits), most)

    def read(self, answer: Array, _window: Window, most: int) -> list[tuple[int, float]]:
        """Return what `find` returns, of the model's answer to one picture."""
        return rank(answer, most, self.activation)
