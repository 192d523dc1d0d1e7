"""Real photographs through real models in a confined worker: the same labels as in this process, and mostly right."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from remora.catalog.build import build
from remora.catalog.local import LocalModel
from remora.catalog.photos import Photo, fetch_photos
from remora.errors import InvalidArgumentError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.workers.contract import SHARED, Job, ModelSpec, Result
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    try:
        return fetch_photos()
    except UnavailableError as error:
        pytest.skip(f"the photographs are missing: {error}")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Reactor, WorkerPool]]:
    reactor = Reactor()
    pool = WorkerPool(reactor, WorkerSettings(device="cpu", standby=0))
    yield reactor, pool
    pool.close()
    reactor.close()


def load(running: tuple[Reactor, WorkerPool], name: str) -> LocalModel:
    try:
        entry = build(name)
    except UnavailableError as error:
        pytest.skip(f"model {name} is missing: {error}")
    reactor, pool = running
    box: list[ModelSpec | RemoraError] = []
    pool.load(SHARED, entry.source, box.append)
    while not box:
        reactor.run_once(1)
    assert isinstance(box[0], ModelSpec)
    return LocalModel(entry.source)


def classify(running: tuple[Reactor, WorkerPool], name: str, pictures: list[bytes]) -> list[Result | RemoraError]:
    """Classify all pictures at once."""
    reactor, pool = running
    answers: dict[int, Result | RemoraError] = {}
    for number, picture in enumerate(pictures):
        job = Job("classify", SHARED, "t", name, image=memoryview(picture))
        pool.submit(job, lambda outcome, number=number: answers.update({number: outcome}))  # type: ignore[misc]
    end_s = time.monotonic() + 30
    while len(answers) < len(pictures):
        assert time.monotonic() < end_s
        reactor.run_once(1)
    return [answers[number] for number in range(len(pictures))]


@pytest.mark.parametrize(("name", "right", "right_in_five"), [("efficientnet-lite0", 18, 19), ("mobilenet-v2", 17, 19)])
def test_twenty_photographs_get_the_labels_of_the_native_model(
    running: tuple[Reactor, WorkerPool], photos: list[Photo], name: str, right: int, right_in_five: int
) -> None:
    native = load(running, name)
    results = classify(running, name, [photo.path.read_bytes() for photo in photos])
    first = five = 0
    for photo, result in zip(photos, results, strict=True):
        assert isinstance(result, Result)
        assert list(result.labels) == native.classify(photo.path.read_bytes())
        indices = [label.index for label in result.labels]
        first += indices[0] == photo.class_index
        five += photo.class_index in indices
    assert first >= right
    assert five >= right_in_five


def test_a_picture_that_is_no_picture_is_refused_and_the_next_is_answered(
    running: tuple[Reactor, WorkerPool], photos: list[Photo]
) -> None:
    load(running, "efficientnet-lite0")
    pictures = [b"no picture", photos[0].path.read_bytes()[:1000], photos[0].path.read_bytes()]
    text, cut, whole = classify(running, "efficientnet-lite0", pictures)
    assert type(text) is type(cut) is InvalidArgumentError
    assert "not a picture" in str(text)
    assert isinstance(whole, Result)
    assert whole.labels[0].index == photos[0].class_index
