"""Detection, pose, segmentation and depth from the SDK and the command line, through a real agent."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import remora
import remora.aio
from agent_process import AgentProcess, catalogue_directory, running_agent
from remora.catalog.photos import fetch_person
from remora.cli.main import main


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    models = catalogue_directory()
    for name in ("centernet", "movenet-lightning", "selfie-segmentation"):
        if not (models / name).is_dir():
            pytest.skip(f"the model {name} is not built: run `make models`")
    with (
        tempfile.TemporaryDirectory(prefix="remora-pictures-") as directory,
        running_agent(Path(directory), models=models) as agent,
    ):
        yield agent


@pytest.fixture(scope="module")
def person() -> Path:
    try:
        return fetch_person()
    except (remora.UnavailableError, remora.FailedPreconditionError) as error:
        pytest.skip(f"the photograph of a person is missing: {error}")


@pytest.fixture
def session(agent: AgentProcess) -> Iterator[remora.Session]:
    with remora.connect(agent.address) as session:
        yield session


def test_the_session_finds_objects_points_and_parts(session: remora.Session, person: Path) -> None:
    (found,) = session.detect(person)
    assert (found.name, found.index) == ("person", 0)
    assert found.box == pytest.approx((215, 9, 944, 1190), abs=15)
    points = session.pose(person)
    assert [point.name for point in points][:2] == ["nose", "left eye"]
    parts = session.segment(person, arrays=True)
    assert parts.labels == ("background", "person")
    assert parts.mask.shape == (256, 256)
    x1, y1, x2, y2 = (int(side * 256 / 1200) for side in found.box)
    assert parts.mask[y1:y2, x1:x2].sum() > 0.95 * parts.mask.sum()
    plain = session.segment(person)
    assert isinstance(plain.mask, remora.Tensor)
    np.testing.assert_array_equal(plain.mask.numpy(), parts.mask)


def test_asyncio_gives_the_same_answers(agent: AgentProcess, session: remora.Session, person: Path) -> None:
    async def look() -> tuple[object, object, object]:
        async with remora.aio.connect(agent.address) as asynchronous:
            objects, points, parts = await asyncio.gather(
                asynchronous.detect(person, model="centernet", top=1),
                asynchronous.pose(person),
                asynchronous.segment(person),
            )
            with pytest.raises(remora.UnimplementedError):
                await asynchronous.depth(person)
            return objects, points, parts.mask

    assert asyncio.run(look()) == (session.detect(person), session.pose(person), session.segment(person).mask)


def test_an_operation_without_a_model_says_what_is_missing(session: remora.Session, person: Path) -> None:
    with pytest.raises(remora.UnimplementedError, match="no model for this operation in the catalogue") as caught:
        session.depth(person)
    assert "add a manifest with task = 'depth'" in str(caught.value)
    with pytest.raises(remora.InvalidArgumentError, match="is for detection, pose needs one for pose"):
        session.pose(person, model="centernet")
    with pytest.raises(remora.InvalidArgumentError, match="top=0"):
        session.detect(person, top=0)


def test_the_commands_show_people_and_machines_the_same(
    agent: AgentProcess, person: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> str:
        assert main([*words, str(person), "--address", agent.address]) == 0
        return capsys.readouterr().out

    assert "person" in command("detect")
    (found,) = json.loads(command("detect", "--json"))["objects"]
    assert found["name"] == "person"
    assert len(found["box"]) == 4
    assert len(json.loads(command("pose", "--json"))["keypoints"]) == 17
    assert "nose" in command("pose")
    assert json.loads(command("segment", "--json"))["size"] == [256, 256]
    mask = tmp_path / "mask.pgm"
    assert "background" in command("segment", "--output", str(mask))
    assert mask.read_bytes().startswith(b"P5 256 256 1\n")
    assert mask.stat().st_size == len(b"P5 256 256 1\n") + 65536
