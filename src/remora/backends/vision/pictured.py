"""What all picture tasks are made of: a picture becomes the model's input, and its answer is read by the task.

The two halves are apart because pictures of several callers can share one run between them (`workers.joining`).
"""

from __future__ import annotations

from dataclasses import dataclass

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.backends.vision.pictures import Window, prepare_window
from remora.backends.vision.preprocess import Preprocess
from remora.backends.vision.tables import Table, check_input


@dataclass(frozen=True)
class Pictured:
    """A loaded model with the preprocessing, the input and the output that its manifest names."""

    model: LoadedModel
    preprocess: Preprocess
    input: str
    output: str

    def feeds(self, encoded: bytes | memoryview, limits: Limits) -> tuple[dict[str, Array], Window]:
        """Return the model's input for a picture, one row, and which part of the picture it shows.

        Raises:
            InvalidArgumentError: it is no picture, is damaged, or is larger than `limits` allow.
        """
        shown, window = prepare_window(encoded, self.preprocess, limits)
        return {self.input: shown}, window

    def answer(self, encoded: bytes | memoryview, stop: Stop, limits: Limits) -> tuple[Array, Window]:
        """Run the model on one picture; return its answer, and which part of the picture that is about."""
        feeds, window = self.feeds(encoded, limits)
        return self.model.run(feeds, self.model.check(feeds, (self.output,)), stop)[0], window


def parts(model: LoadedModel, how: Preprocess, table: Table) -> tuple[LoadedModel, Preprocess, str, str]:
    """Match the input and output that a manifest's table names with a model; return the fields of `Pictured`.

    Raises:
        InvalidArgumentError: the model does not have them, or takes other pictures.
    """
    source = table.tensor("input", model.inputs)
    check_input(model, source, how)
    return model, how, source, table.tensor("output", model.outputs)
