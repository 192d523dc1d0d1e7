"""Batches in a real worker: one run for several jobs, and each job's own answer, error and end."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pool_rig import Rig, brightest_model, infer, rows_model, table_model
from remora.errors import CancelledError, DeadlineExceededError, InvalidArgumentError, RemoraError
from remora.workers.contract import SHARED, Job, ModelSpec, Result

Boxes = list[list[Result | RemoraError]]
#: About a third of a second on an idle core.
LONG = 150_000


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("models"), standby=0, stop_grace_s=0.3)
    for name, data in (("rows", rows_model()), ("long", rows_model(LONG)), ("table", table_model())):
        assert isinstance(made.load(SHARED, made.source(name, data)), ModelSpec)
    for tenant in "abcd":
        for model in ("rows", "long"):
            value(made.run(infer(rows([0]), model, tenant=tenant)))  # its arena is mapped
    yield made
    made.close()


def together(rig: Rig, jobs: Sequence[Job]) -> Boxes:
    boxes: Boxes = [[] for _ in jobs]
    rig.pool.submit_together([(job, box.append) for job, box in zip(jobs, boxes, strict=True)])
    return boxes


def rows(values: Sequence[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.repeat(np.asarray(values, np.float32), 4).reshape(-1, 4)


def value(outcome: Result | RemoraError) -> list[float]:
    assert isinstance(outcome, Result), outcome
    array = np.frombuffer(outcome.outputs[0].data, np.float32).reshape(-1, 4)
    found = [float(row[0]) for row in array]
    outcome.release()
    return found


def test_each_tenant_gets_its_own_rows_and_pays_for_them(rig: Rig) -> None:
    jobs = [infer(rows(values), "rows", tenant=tenant) for tenant, values in (("a", [1]), ("b", [2, 3, 4]), ("c", [5]))]
    boxes = together(rig, jobs)
    rig.until(lambda: all(boxes))
    results = [box[0] for box in boxes]
    assert all(isinstance(result, Result) and result.whole_us for result in results), "they ran as one"
    spent = [(result.run_us, result.whole_us) for result in results if isinstance(result, Result)]
    assert spent[1][0] == pytest.approx(spent[1][1] * 3 / 5, abs=2)
    assert [value(result) for result in results] == [[2], [4, 6, 8], [10]]
    for tenant in "abc":
        assert rig.pool._arenas[tenant].used == 0


def test_a_batch_of_a_model_with_dear_runs_takes_little_longer_than_one(rig: Rig) -> None:
    times = []
    for count in (1, 8):
        began_s = time.monotonic()
        boxes = together(rig, [infer(rows([number]), "long", tenant="a") for number in range(count)])
        rig.until(partial(all, boxes))
        times.append(time.monotonic() - began_s)
        assert [value(box[0]) for box in boxes] == [[2.0 * number] for number in range(count)]
    print(f"\n1: {times[0] * 1e3:.0f} ms, 8 together: {times[1] * 1e3:.0f} ms")
    assert times[1] < 4 * times[0]


def test_wrong_values_of_one_fail_nobody_else(rig: Rig) -> None:
    indices = [np.asarray([[number]], np.int64) for number in (3, 99, 7)]
    jobs = [infer(array, "table", tenant=tenant) for array, tenant in zip(indices, "abc", strict=True)]
    boxes = together(rig, jobs)
    rig.until(lambda: all(boxes))
    first, wrong, last = (box[0] for box in boxes)
    assert isinstance(wrong, InvalidArgumentError)
    for outcome, expected in ((first, 3), (last, 7)):
        assert isinstance(outcome, Result)
        assert np.frombuffer(outcome.outputs[0].data, np.float32).tolist() == [expected]
        outcome.release()


def test_jobs_of_different_forms_are_each_answered(rig: Rig) -> None:
    jobs = [infer(rows([1]), "rows", tenant="a"), infer(np.zeros((1, 5), np.float32), "rows", tenant="b")]
    boxes = together(rig, [*jobs, infer(rows([2]).astype(np.float64), "rows", tenant="c")])
    rig.until(lambda: all(boxes))
    assert value(boxes[0][0]) == [2]
    assert isinstance(boxes[1][0], InvalidArgumentError)
    assert isinstance(boxes[2][0], InvalidArgumentError)


def test_a_member_that_is_cancelled_is_answered_at_once_and_the_others_go_on(rig: Rig) -> None:
    worker = rig.worker().pid
    boxes: Boxes = [[], [], []]
    jobs = [infer(rows([number]), "long", tenant=tenant) for number, tenant in enumerate("abc")]
    handles = rig.pool.submit_together([(job, box.append) for job, box in zip(jobs, boxes, strict=True)])
    end_s = time.monotonic() + 0.05  # it has begun: the inputs are copied
    rig.until(lambda: time.monotonic() > end_s)
    handles[1].cancel()
    rig.until(lambda: boxes[1])
    assert isinstance(boxes[1][0], CancelledError)
    assert not boxes[0]
    rig.until(lambda: all(boxes))
    assert [value(boxes[0][0]), value(boxes[2][0])] == [[0], [4]]
    assert rig.worker().pid == worker


def test_the_deadline_of_a_member_is_its_own(rig: Rig) -> None:
    worker = rig.worker().pid
    late = infer(rows([1]), "long", tenant="a", deadline_s=time.monotonic() + 0.05)
    boxes = together(rig, [late, infer(rows([2]), "long", tenant="b")])
    rig.until(lambda: all(boxes))
    assert isinstance(boxes[0][0], DeadlineExceededError)
    assert value(boxes[1][0]) == [4]
    assert rig.worker().pid == worker


def test_a_batch_that_everyone_gives_up_is_stopped(rig: Rig) -> None:
    boxes: Boxes = [[], []]
    jobs = [infer(rows([1]), "long", tenant=tenant) for tenant in "ab"]
    handles = rig.pool.submit_together([(job, box.append) for job, box in zip(jobs, boxes, strict=True)])
    for handle in handles:
        handle.cancel()
    rig.until(lambda: all(boxes))
    assert all(isinstance(box[0], CancelledError) for box in boxes)
    assert value(rig.run(infer(rows([3]), "rows", tenant="a"))) == [6]


def test_a_batch_that_waits_for_its_model_and_memory_is_answered_too(tmp_path: Path) -> None:
    made = Rig(tmp_path, standby=0)
    try:
        source = made.source("rows", rows_model())
        loads: list[ModelSpec | RemoraError] = []
        made.pool.load(SHARED, source, loads.append)
        boxes = together(made, [infer(rows([number]), "rows", tenant=str(number)) for number in range(5)])
        made.until(lambda: all(boxes))
        assert [value(box[0]) for box in boxes] == [[2.0 * number] for number in range(5)]
    finally:
        made.close()


def test_more_jobs_than_one_message_describes_are_each_answered(rig: Rig) -> None:
    boxes = together(rig, [infer(rows([number]), "rows", tenant="a") for number in range(700)])
    rig.until(lambda: all(boxes))
    assert [value(box[0])[0] for box in boxes] == [2.0 * number for number in range(700)]


def test_a_worker_that_dies_under_a_batch_costs_nobody_an_answer(rig: Rig) -> None:
    boxes = together(rig, [infer(rows([number]), "long", tenant=tenant) for number, tenant in enumerate("abcd")])
    end_s = time.monotonic() + 0.05
    rig.until(lambda: time.monotonic() > end_s)
    process = rig.pool._domains[SHARED].process
    assert process is not None
    process.kill("the test ends it")
    rig.until(lambda: all(boxes))
    assert [value(box[0]) for box in boxes] == [[0], [2], [4], [6]]


# -- pictures ---------------------------------------------------------------------------------------------------------

COLOURS = {"red": 0, "green": 1, "blue": 2}
MANIFEST = {
    "preprocess": {"width": 8, "height": 8, "crop": "none", "layout": "nchw", "dtype": "float32"},
    "labels": list(COLOURS),
}


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> memoryview:
    stream = io.BytesIO()
    Image.new("RGB", size, {"red": (250, 9, 9), "green": (9, 250, 9), "blue": (9, 9, 250)}[colour]).save(stream, kind)
    return memoryview(stream.getvalue())


@pytest.fixture(scope="module")
def classifier(rig: Rig) -> Rig:
    source = rig.source("colours", brightest_model(), task="classification", manifest=MANIFEST)
    assert isinstance(rig.load(SHARED, source), ModelSpec)
    return rig


def classify(image: memoryview, tenant: str = "a", top: int = 3) -> Job:
    return Job("classify", SHARED, tenant, "colours", image=image, top=top)


def test_pictures_of_several_tenants_are_one_run_and_each_gets_its_own_labels(classifier: Rig) -> None:
    images = [
        ("red", picture("red", "JPEG", (300, 200))),
        ("blue", picture("blue", "WEBP")),
        ("green", picture("green")),
        ("blue", picture("blue", "BMP", (8, 8))),
    ]
    # Each by its tenant: a worker that was started again meanwhile has nobody's arena.
    alone = [classifier.run(classify(image, tenant)) for (_, image), tenant in zip(images, "abcd", strict=True)]
    boxes = together(
        classifier,
        [classify(image, tenant, top) for (_, image), tenant, top in zip(images, "abcd", (1, 2, 3, 3), strict=True)],
    )
    classifier.until(lambda: all(boxes))
    for (colour, _image), box, lone, top in zip(images, boxes, alone, (1, 2, 3, 3), strict=True):
        found = box[0]
        assert isinstance(found, Result)
        assert isinstance(lone, Result)
        assert found.whole_us > 0, "they ran as one"
        assert found.labels[0].name == colour
        assert len(found.labels) == top
        assert [label.score for label in found.labels] == pytest.approx([one.score for one in lone.labels[:top]])
    for tenant in "abcd":
        assert classifier.pool._arenas[tenant].used == 0


def test_a_picture_that_is_none_fails_alone_and_the_others_still_run_as_one(classifier: Rig) -> None:
    images = [picture("red"), memoryview(b"no picture"), picture("green")[:60], picture("blue")]
    boxes = together(classifier, [classify(image, tenant) for image, tenant in zip(images, "abcd", strict=True)])
    classifier.until(lambda: all(boxes))
    red, none, half, blue = (box[0] for box in boxes)
    assert isinstance(none, InvalidArgumentError)
    assert isinstance(half, InvalidArgumentError)
    for found, colour in ((red, "red"), (blue, "blue")):
        assert isinstance(found, Result)
        assert found.labels[0].name == colour
        assert found.whole_us > 0


def test_pictures_and_tensors_for_one_model_are_each_answered(classifier: Rig) -> None:
    tensor = np.zeros((1, 3, 8, 8), np.float32)
    tensor[0, 1] = 1
    boxes = together(classifier, [classify(picture("red")), infer(tensor, "colours", tenant="b")])
    classifier.until(lambda: all(boxes))
    seen, computed = (box[0] for box in boxes)
    assert isinstance(seen, Result)
    assert seen.labels[0].name == "red"
    assert isinstance(computed, Result)
    assert np.frombuffer(computed.outputs[0].data, np.float32).tolist() == [0, 1, 0]
    computed.release()
