"""Real detection, pose and segmentation models in a confined worker, on photographs whose content is known."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from remora.catalog.build import build
from remora.catalog.photos import fetch_person, fetch_photos
from remora.errors import FailedPreconditionError, InvalidArgumentError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.workers.contract import SHARED, Job, ModelSpec, Result
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings

MODELS = {"detect": "centernet", "pose": "movenet-lightning", "segment": "selfie-segmentation"}


class Rig:
    def __init__(self, reactor: Reactor, pool: WorkerPool) -> None:
        self.reactor, self.pool = reactor, pool

    def wait(self, box: list[object]) -> object:
        end_s = time.monotonic() + 30
        while not box:
            assert time.monotonic() < end_s
            self.reactor.run_once(1)
        return box[0]

    def look(self, operation: str, picture: bytes, top: int = 100, model: str = "") -> Result:
        name = model or MODELS[operation]
        job = Job(operation, SHARED, "t", name, image=memoryview(picture), top=top)
        box: list[object] = []
        self.pool.submit(job, box.append)
        answer = self.wait(box)
        if isinstance(answer, RemoraError):
            raise answer
        assert isinstance(answer, Result)
        return answer


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    reactor = Reactor()
    pool = WorkerPool(reactor, WorkerSettings(device="cpu", standby=0))
    made = Rig(reactor, pool)
    try:
        for name in MODELS.values():
            box: list[object] = []
            pool.load(SHARED, build(name).source, box.append)
            assert isinstance(made.wait(box), ModelSpec), box
    except (UnavailableError, FailedPreconditionError) as error:
        pytest.skip(f"a model is missing: {error}")
    else:
        yield made
    finally:
        pool.close()
        reactor.close()


@pytest.fixture(scope="module")
def person() -> bytes:
    try:
        return fetch_person().read_bytes()
    except (UnavailableError, FailedPreconditionError) as error:
        pytest.skip(f"the photograph of a person is missing: {error}")


@pytest.mark.parametrize(("photo", "name"), [(1, "chair"), (6, "truck"), (15, "bird"), (17, "bird")])
def test_photographs_hold_what_their_class_says(rig: Rig, photo: int, name: str) -> None:
    best, *_ = rig.look("detect", fetch_photos()[photo].path.read_bytes()).labels
    assert best.name == name
    assert best.score > 0.4


def test_a_person_is_found_where_it_stands(rig: Rig, person: bytes) -> None:
    (found,) = rig.look("detect", person).labels
    assert found.name == "person"
    assert found.place == pytest.approx((215, 9, 944, 1190), abs=15)


def test_the_points_of_a_body_lie_where_a_body_has_them(rig: Rig, person: bytes) -> None:
    points = rig.look("pose", person).labels
    assert len(points) == 17
    at = {point.name: point.place for point in points}
    assert at["nose"] == pytest.approx((561, 104), abs=15)
    down = ["nose", "left shoulder", "left hip", "left ankle"]
    heights = [at[name][1] for name in down]
    assert heights == sorted(heights)
    assert sum(point.score > 0.4 for point in points) >= 12
    assert [point.name for point in rig.look("pose", person, top=3).labels] == [point.name for point in points[:3]]


def test_a_person_is_told_from_the_background(rig: Rig, person: bytes) -> None:
    answer = rig.look("segment", person)
    (mask,) = answer.outputs
    assert (mask.dtype, mask.shape) == ("uint8", (256, 256))
    assert [label.name for label in answer.labels] == ["background", "person"]
    share = sum(mask.data) / len(mask.data)
    assert 0.1 < share < 0.4
    head = 104 * 256 // 1200 * 256 + 561 * 256 // 1200
    assert (mask.data[head], mask.data[0], mask.data[-1]) == (1, 0, 0)
    answer.release()


def test_a_model_for_another_task_is_refused_with_both_named(rig: Rig, person: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="is for pose, detect needs one for detection"):
        rig.look("detect", person, model="movenet-lightning")
    with pytest.raises(InvalidArgumentError, match="not a picture"):
        rig.look("segment", b"nothing of that kind")
