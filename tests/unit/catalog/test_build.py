"""Recipes: whole or not at all, quick when there, and never other bytes than the pinned ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from remora.catalog import build as builder
from remora.catalog.packages import Package, fetch, read_member
from remora.errors import DataLossError, FailedPreconditionError, NotFoundError, UnavailableError


def wheel(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_identity_model_is_built_whole_and_found_again(tmp_path: Path) -> None:
    first = builder.build("identity", tmp_path)
    made_at = first.source.path.stat().st_mtime_ns
    assert builder.is_built("identity", tmp_path)
    assert builder.build("identity", tmp_path).source == first.source
    assert first.source.path.stat().st_mtime_ns == made_at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity"]


def test_an_older_build_is_replaced(tmp_path: Path) -> None:
    builder.build("identity", tmp_path)
    manifest = tmp_path / "identity" / "manifest.toml"
    manifest.write_text(manifest.read_text() + "\n# from another version\n")
    assert not builder.is_built("identity", tmp_path)
    builder.build("identity", tmp_path)
    assert builder.is_built("identity", tmp_path)


def test_a_result_with_another_digest_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remora.catalog import architectures

    monkeypatch.setitem(architectures.ARCHITECTURES, "identity", lambda _weights: b"something else")
    with pytest.raises(DataLossError, match="expected is 50997e1a"):
        builder.build("identity", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_lists_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        builder.build("resnet-9000", tmp_path)
    assert "efficientnet-lite0" in (caught.value.fix or "")


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match="cannot write"):
        builder.build("identity", tmp_path / "file" / "models")


def test_every_recipe_pins_all_it_downloads() -> None:
    for name in builder.recipe_names():
        manifest, _text = builder.recipe(name)
        assert manifest.name == name
        assert len(manifest.sha256) == 64
        tables = [part for part in manifest.recipe.values() if isinstance(part, dict)]
        parts = [part for part in tables if "npm" in part or "requirement" in part]
        assert parts or manifest.recipe == {"architecture": "identity"}
        for table in parts:
            assert {len(table["sha256"]), len(table["member_sha256"])} == {64}


def test_a_file_of_a_wheel_is_checked(tmp_path: Path) -> None:
    path = wheel(tmp_path, {"a/b.txt": b"text"})
    assert read_member(path, "a/b.txt", digest(b"text")) == b"text"
    with pytest.raises(DataLossError, match="pinned is 0000"):
        read_member(path, "a/b.txt", "0" * 64)
    with pytest.raises(DataLossError, match="has no file c"):
        read_member(path, "c")


class _Pip:
    """Stands in for pip: puts a wheel where it is told to, or fails."""

    def __init__(self, made: Path | None = None, stderr: str = "") -> None:
        self.made, self.stderr = made, stderr
        self.command: list[str] = []
        self.requirements = ""

    def __call__(self, command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        self.command = command
        self.requirements = Path(command[command.index("--requirement") + 1]).read_text()
        if self.made is not None:
            target = Path(command[command.index("--dest") + 1]) / self.made.name
            target.write_bytes(self.made.read_bytes())
        return subprocess.CompletedProcess(command, 0 if self.made is not None else 1, "", self.stderr)


def test_packages_are_fetched_by_hash_without_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path / "index", {"x": b"1"})
    pip = _Pip(made)
    monkeypatch.setattr(subprocess, "run", pip)
    target = tmp_path / "target"
    target.mkdir()
    sha = digest(made.read_bytes())
    assert fetch([Package("thing==1.0", sha)], target) == [target / made.name]
    assert pip.requirements == f"thing==1.0 --hash=sha256:{sha}\n"
    assert {"--no-deps", "--require-hashes"} <= set(pip.command)
    assert pip.command[0] == sys.executable


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", _Pip(wheel(tmp_path / "index", {"x": b"1"})))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DataLossError, match="other files"):
        fetch([Package("thing==1.0", "0" * 64)], target)


@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", DataLossError, "serves other files"),
        ("/usr/bin/python3: No module named pip", FailedPreconditionError, "has no pip"),
        ("WARNING: x\nERROR: Could not find a version", UnavailableError, "Could not find a version"),
        ("", UnavailableError, "no message"),
    ],
)
def test_what_pip_says_becomes_one_clear_line(
    stderr: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _Pip(stderr=stderr))
    with pytest.raises(error, match=message):
        fetch([Package("thing==1.0", "0" * 64)], tmp_path)


def test_photographs_carry_their_class_and_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remora.catalog import photos

    made = wheel(tmp_path / "index", {f"foolbox/data/imagenet_{n:02}_{n * 7}.jpg": b"jpeg" for n in range(20)})
    pip = _Pip(made)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(photos, "_PACKAGE", Package("thing==1.0", digest(made.read_bytes())))
    found = photos.fetch_photos(tmp_path / "photos")
    assert [photo.class_index for photo in found] == [n * 7 for n in range(20)]
    pip.made = None
    assert photos.fetch_photos(tmp_path / "photos") == found


def test_the_command_builds_lists_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from remora.cli import models

    parser = argparse.ArgumentParser()
    models.add_arguments(parser)

    def command(*words: str) -> str:
        assert models.run(parser.parse_args([*words, "--dir", str(tmp_path)])) == 0
        return capsys.readouterr().out

    assert "identity: built" in command("build", "identity")
    assert "identity: is there" in command("build", "identity")
    rows = {row["name"]: row for row in json.loads(command("list", "--json"))}
    assert rows["identity"]["built"] is True
    assert rows["mobilenet-v2"]["built"] is False
    assert "not built" in command("list")
    assert json.loads(command("show", "identity"))["task"] == "tensor"
    with pytest.raises(NotFoundError, match="no model") as caught:
        command("show", "mobilenet-v2")
    assert caught.value.fix == "run: remora models build mobilenet-v2"
