"""The picture tasks by the name that a manifest gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from remora.backends.contract import LoadedModel
from remora.backends.vision.classification import Classifier
from remora.backends.vision.detection import Detector
from remora.backends.vision.maps import DepthFinder, Segmenter
from remora.backends.vision.pose import PoseFinder

#: Answer with rows (class or point, score, place); the others with a map.
Finder: TypeAlias = Classifier | Detector | PoseFinder
Mapper: TypeAlias = Segmenter | DepthFinder
PictureTask: TypeAlias = Finder | Mapper

TASKS: Mapping[str, Callable[[LoadedModel, Mapping[str, Any], int], PictureTask]] = {
    "classification": Classifier.from_manifest,
    "detection": Detector.from_manifest,
    "segmentation": Segmenter.from_manifest,
    "pose": PoseFinder.from_manifest,
    "depth": DepthFinder.from_manifest,
}


def picture_task(task: str, model: LoadedModel, manifest: Mapping[str, Any], classes: int) -> PictureTask | None:
    """Return what does a manifest's task on a loaded model, None for a task without pictures.

    Args:
        classes: How many labels the manifest has; 0 if it has none.

    Raises:
        InvalidArgumentError: the manifest does not fit the model.
    """
    make = TASKS.get(task)
    return make(model, manifest, classes) if make is not None else None
