"""Classification: scores become a ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictures import prepare
from remora.backends.vision.preprocess import Preprocess
from remora.backends.vision.tables import Table, check_input, finite, preprocess_of


def rank(scores: Array, top: int, activation: str = "softmax") -> list[tuple[int, float]]:
    """Return (class, probability) of the `top` best classes, best first."""
    flat = finite(scores).reshape(-1)
    if activation == "softmax":
        powers = np.exp(flat - flat.max())
        flat = powers / powers.sum()
    order = np.argsort(-flat, kind="stable")[: max(1, top)]
    return [(int(index), float(flat[index])) for index in order]


@dataclass(frozen=True)
class Classifier:
    """A loaded model with the preprocessing and the score output that its manifest names."""

    model: LoadedModel
    preprocess: Preprocess
    input: str
    output: str
    activation: str = "softmax"

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> Self:
        """Match a manifest with the model it describes.

        Raises:
            InvalidArgumentError: the model cannot classify, or the manifest names what it does not have.
        """
        how = preprocess_of(manifest, "classification")
        table = Table(manifest, "scores", ("input", "output", "activation"))
        source = table.tensor("input", model.inputs)
        target = table.tensor("output", model.outputs)
        check_input(model, source, how)
        return cls(model, how, source, target, table.choice("activation", ("softmax", "none")))

    def find(self, encoded: bytes | memoryview, most: int, stop: Stop, limits: Limits) -> list[tuple[int, float]]:
        """Return (class, probability) of the best classes, best first."""
        feeds = {self.input: prepare(encoded, self.preprocess, limits)}
        wanted = self.model.check(feeds, (self.output,))
        return rank(self.model.run(feeds, wanted, stop)[0], most, self.activation)
