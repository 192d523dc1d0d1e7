"""What the tables of a manifest make of a model's answer: boxes, points and maps, in the picture's own pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remora.backends.contract import Array, Exposure, Limits, Spec, Stop
from remora.backends.vision.detection import Detector, suppress
from remora.backends.vision.maps import DepthFinder, Segmenter
from remora.backends.vision.pictures import prepare_window
from remora.backends.vision.pose import PoseFinder
from remora.backends.vision.preprocess import Preprocess
from remora.backends.vision.tasks import TASKS, picture_task
from remora.errors import InternalError, InvalidArgumentError

PREPROCESS = {"width": 100, "height": 100, "crop": "none", "layout": "nhwc", "dtype": "uint8"}
MANIFEST = {"preprocess": PREPROCESS}


class Fixed:
    """A model with one input and one output that always gives the same answer."""

    device = "cpu"
    memory_bytes = 0
    exposure = Exposure()

    def __init__(self, answer: Any, dtype: str = "uint8", shape: tuple[int, ...] = (1, 100, 100, 3)) -> None:
        self.answer = np.asarray(answer, np.float32)
        self.inputs: tuple[Spec, ...] = (Spec("picture", dtype, shape),)
        self.outputs: tuple[Spec, ...] = (Spec("answer", "float32", self.answer.shape),)
        self.feeds: Mapping[str, Array] = {}

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        return tuple(wanted)

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> None:
        return None

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        self.feeds = feeds
        return [self.answer]


def picture(width: int = 400, height: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (250, 250, 250)).save(stream, "PNG")
    return stream.getvalue()


def detect(rows: Any, table: dict[str, Any] | None = None, most: int = 10, crop: str = "none") -> Any:
    manifest = {"preprocess": PREPROCESS | {"crop": crop}, "boxes": table or {}}
    return Detector.from_manifest(Fixed(rows), manifest, 3).find(picture(), most, Stop(), Limits())


def test_boxes_are_given_in_pixels_of_the_picture() -> None:
    assert detect([[[10, 20, 50, 60, 0.9, 2]]]) == [(2, pytest.approx(0.9), 40, 40, 200, 120)]
    share = {"unit": "share", "columns": ["score", "class", "y1", "x1", "y2", "x2"]}
    assert detect([[0.9, 2, 0.2, 0.1, 0.6, 0.5]], share)[0][2:] == pytest.approx((40, 40, 200, 120))


def test_a_box_beyond_the_picture_ends_at_its_edge() -> None:
    assert detect([[-10, -1, 130, 101, 0.9, 0]])[0][2:] == (0, 0, 400, 200)


def test_boxes_of_a_padded_input_and_of_a_cropped_one_come_back_to_the_picture() -> None:
    # 400x200 in 100x100: the picture lies in rows 25 to 75.
    assert detect([[0, 25, 100, 75, 0.9, 0], [0, 0, 50, 50, 0.8, 1]], crop="pad") == [
        (0, pytest.approx(0.9), 0, 0, 400, 200),
        (1, pytest.approx(0.8), 0, 0, 200, 100),
    ]
    # The middle square of side int(100 / 132 * 200) = 151, from (124, 24).
    assert detect([[0, 0, 100, 100, 0.9, 0]], crop="center")[0][2:] == (124, 24, 275, 175)


def test_weak_boxes_unknown_classes_and_all_beyond_the_wanted_number_are_left_out() -> None:
    rows = [[0, 0, 9, 9, 0.29, 0], [20, 0, 29, 9, 0.5, 0], [40, 0, 49, 9, 0.7, 1], [60, 0, 69, 9, 0.9, 3]]
    assert [row[0] for row in detect(rows)] == [1, 0]
    assert [row[0] for row in detect(rows, most=1)] == [1]
    assert [row[0] for row in detect(rows, {"threshold": 0.1})] == [1, 0, 0]


def test_only_the_best_of_boxes_over_one_another_is_kept_per_class() -> None:
    rows = np.array([[0, 0, 10, 10, 0.6, 0], [1, 0, 10, 10, 0.9, 0], [1, 0, 10, 10, 0.5, 1], [30, 0, 40, 10, 0.4, 0]])
    assert suppress(rows, 0.4)[:, 4].tolist() == [0.9, 0.5, 0.4]
    assert suppress(rows, 1.0)[:, 4].tolist() == [0.9, 0.6, 0.5, 0.4]
    assert suppress(np.empty((0, 6)), 0.4).shape == (0, 6)


def test_an_answer_that_is_no_rows_of_numbers_is_the_models_fault() -> None:
    with pytest.raises(InternalError, match="a row has 6"):
        detect([1, 2, 3])
    with pytest.raises(InternalError, match="not numbers"):
        detect([[0, 0, 1, np.nan, 0.9, 0]])


def test_points_are_given_in_pixels_of_the_picture_in_the_models_order() -> None:
    table = {"columns": ["y", "x", "score"], "unit": "share"}
    model = Fixed([[[[0.5, 0.25, 0.1], [1.5, -1, 0.9]]]])
    pose = PoseFinder.from_manifest(model, MANIFEST | {"points": table}, 2)
    first, second = pose.find(picture(), 9, Stop(), Limits())
    assert first == pytest.approx((0, 0.1, 100, 100))
    assert second == pytest.approx((1, 0.9, 0, 200))
    with pytest.raises(InternalError, match="3 points have 9"):
        PoseFinder.from_manifest(model, MANIFEST | {"points": table}, 3).find(picture(), 9, Stop(), Limits())


def test_one_channel_is_the_probability_of_the_second_label() -> None:
    table = {"threshold": 0.6}
    model = Fixed([[[[0.5], [0.6]], [[0.7], [0.1]]]])
    mask = Segmenter.from_manifest(model, MANIFEST | {"map": table}, 2).map(picture(), Stop(), Limits())
    assert (mask.dtype.name, mask.tolist()) == ("uint8", [[0, 1], [1, 0]])
    logits = Segmenter.from_manifest(Fixed([[-1, 1]]), MANIFEST | {"map": {"activation": "sigmoid"}}, 2)
    assert logits.map(picture(), Stop(), Limits()).tolist() == [[0, 1]]


def test_several_channels_give_the_best_label_of_each_place() -> None:
    planes = np.zeros((1, 3, 2, 2))
    planes[0, 2, 0, 1] = planes[0, 1, 1, 1] = 1
    mask = Segmenter.from_manifest(Fixed(planes), MANIFEST | {"map": {"layout": "nchw"}}, 3)
    assert mask.map(picture(), Stop(), Limits()).tolist() == [[0, 2], [0, 1]]
    with pytest.raises(InternalError, match="3 channels for 4 labels"):
        Segmenter.from_manifest(Fixed(planes), MANIFEST | {"map": {"layout": "nchw"}}, 4).map(
            picture(), Stop(), Limits()
        )


def test_depth_has_one_channel_of_floats() -> None:
    depth = DepthFinder.from_manifest(Fixed([[[1.5, 2]]]), MANIFEST, 0).map(picture(), Stop(), Limits())
    assert (depth.dtype.name, depth.tolist()) == ("float32", [[1.5, 2]])
    with pytest.raises(InternalError, match="depth has one"):
        DepthFinder.from_manifest(Fixed(np.zeros((2, 2, 2))), MANIFEST, 0).map(picture(), Stop(), Limits())


@pytest.mark.parametrize(
    ("task", "tables", "classes", "message"),
    [
        ("detection", {}, 0, "at least 1 labels"),
        ("segmentation", {}, 1, "at least 2 labels"),
        ("pose", {"points": {"columns": ["x", "y"]}}, 1, r"\[points\] columns"),
        ("detection", {"boxes": {"columns": "x1"}}, 1, r"\[boxes\] columns"),
        ("detection", {"boxes": {"unit": "mm"}}, 1, r"\[boxes\] unit is 'mm'"),
        ("detection", {"boxes": {"threshold": 2}}, 1, r"\[boxes\] threshold is 2"),
        ("detection", {"boxes": {"treshold": 0.5}}, 1, "unknown keys: treshold"),
        ("detection", {"boxes": {"output": "boxes"}}, 1, r"\[boxes\] output is 'boxes'"),
        ("depth", {"preprocess": PREPROCESS | {"crop": "center"}}, 0, "whole picture"),
        ("segmentation", {"preprocess": PREPROCESS | {"crop": "pad"}}, 2, "whole picture"),
        ("classification", {"preprocess": {}}, 1, r"no \[preprocess\]"),
        ("pose", {"preprocess": PREPROCESS | {"width": 99}}, 1, r"makes uint8\[1, 100, 99, 3\]"),
        ("pose", {"preprocess": PREPROCESS | {"dtype": "int32"}}, 1, "takes uint8"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_when_the_model_is_loaded(
    task: str, tables: dict[str, Any], classes: int, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        picture_task(task, Fixed([0]), MANIFEST | tables, classes)


def test_a_model_for_tensors_has_no_picture_task() -> None:
    assert picture_task("tensor", Fixed([0]), {}, 0) is None
    assert set(TASKS) == {"classification", "detection", "segmentation", "pose", "depth"}


def test_a_padded_input_shows_the_whole_picture_in_its_middle() -> None:
    how = Preprocess(width=100, height=60, crop="pad", dtype="int32", layout="nhwc")
    tensor, window = prepare_window(picture(100, 300), how)
    assert tensor.shape == (1, 60, 100, 3)
    assert tensor.dtype.name == "int32"
    assert (tensor[0, :, 40:60] == 250).all()
    assert not tensor[0, :, :40].any()
    assert not tensor[0, :, 60:].any()
    assert window.place(0.4, 0) == (0, 0)
    assert window.place(0.6, 1) == pytest.approx((100, 300))
