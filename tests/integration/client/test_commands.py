"""`remora ping` and `remora classify`, as a shell sees them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import remora
from fake_agent import FakeAgent, fail
from remora.cli.main import main


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "a.sock") as agent:
        yield agent


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "one.jpg", tmp_path / "two.jpg"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return [str(path) for path in paths]


def test_ping_shows_the_agent_the_session_and_the_times(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--count", "3", "--address", agent.address]) == 0
    shown = capsys.readouterr().out
    for part in ("fake/1", agent.address, "session-0", "classify, infer", "min", "median"):
        assert part in shown


def test_ping_without_an_agent_is_one_line_with_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--address", f"unix://{tmp_path}/none.sock"]) == remora.UnavailableError.exit_status
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such socket" in line
    assert "remora agent --listen" in line


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_ping_refuses_a_count_that_is_none(count: str) -> None:
    with pytest.raises(SystemExit):
        main(["ping", "--count", count])


def test_classify_prints_each_picture_with_its_labels(
    agent: FakeAgent, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", *pictures, "--top", "2", "--address", agent.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == pictures
    assert lines[1].strip().startswith("100.0%")


def test_classify_prints_json_a_line_per_picture(
    agent: FakeAgent, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", *pictures, "--json", "--top", "2", "--address", agent.address]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["picture"] for entry in found] == pictures
    assert found[0]["labels"][0].keys() == {"index", "name", "score"}


def test_classify_reads_a_picture_from_stdin(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"picture")))
    assert main(["classify", "-", "--address", agent.address]) == 0
    assert bytes(agent.called("Classify")[0].image) == b"picture"


def test_a_picture_that_is_refused_does_not_keep_the_others_from_their_turn(
    agent: FakeAgent, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    agent.plan("Classify", fail(remora.InvalidArgumentError("no picture")))
    assert main(["classify", *pictures, "/nowhere.jpg", "--address", agent.address]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == pictures[1]
    first, second = shown.err.splitlines()
    assert first == f"remora classify: {pictures[0]}: no picture"
    assert "/nowhere.jpg" in second


def test_a_refusal_that_is_true_of_every_picture_ends_the_command(
    agent: FakeAgent, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    agent.plan("Classify", fail(remora.PermissionDeniedError("rule no-pictures")))
    assert main(["classify", *pictures, "--address", agent.address]) == remora.PermissionDeniedError.exit_status
    assert len(agent.called("Classify")) == 1
    assert "rule no-pictures" in capsys.readouterr().err
