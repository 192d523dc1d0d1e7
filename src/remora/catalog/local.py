"""A catalogue model in this very process: what the demo and the benchmark compare the long way with.

It runs the same backend code as a worker does, so a difference in an answer or in time comes from the way and not from
the work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from remora.backends.contract import Array, Limits, Stop
from remora.backends.formats import backend_for
from remora.backends.vision.classification import Classifier
from remora.backends.vision.pictures import prepare
from remora.backends.vision.tasks import picture_task
from remora.catalog.entries import load_catalog, models_dir
from remora.errors import InvalidArgumentError, NotFoundError
from remora.workers.contract import LabelScore, ModelSource


class LocalModel:
    """One model, ready to run in any thread of this process."""

    def __init__(self, source: ModelSource, *, device: str = "auto") -> None:
        self._limits = Limits()
        self.model = backend_for(source.format).load(
            source.path.read_bytes(), device, self._limits, source.run_threads(len(os.sched_getaffinity(0)))
        )
        self._labels: Sequence[str] = source.manifest.get("labels", ())
        self._pictures = picture_task(source.task, self.model, source.manifest, len(self._labels))

    @classmethod
    def from_catalog(cls, name: str, *, device: str = "auto") -> LocalModel:
        """Load a model by its catalogue name.

        Raises:
            NotFoundError: it is not in the catalogue.
        """
        entry = load_catalog().get(name)
        if entry is None:
            raise NotFoundError(f"no model {name!r} in {models_dir()}", fix=f"run: remora models build {name}")
        return cls(entry.source, device=device)

    def classify(self, encoded: bytes | memoryview, top: int = 5) -> list[LabelScore]:
        """Return the best labels of an encoded picture, best first."""
        ranked = self._need_classifier().find(encoded, top, Stop(), self._limits)
        return [LabelScore(index, self._labels[index], score) for index, score in ranked]

    def prepare(self, encoded: bytes | memoryview) -> Array:
        """Return the input tensor that `classify` makes of a picture."""
        return prepare(encoded, self._need_classifier().preprocess, self._limits)

    def infer(self, feeds: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model on tensors; all outputs unless some are named."""
        wanted = self.model.check(feeds, outputs)
        return dict(zip(wanted, self.model.run(feeds, wanted, Stop()), strict=True))

    def _need_classifier(self) -> Classifier:
        if not isinstance(self._pictures, Classifier):
            raise InvalidArgumentError("this model does not classify pictures", fix="use infer")
        return self._pictures
