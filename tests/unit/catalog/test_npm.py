"""Models out of npm's packages: pinned like wheels, and where npm is missing the rest is built."""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from remora.catalog import build as builder
from remora.catalog import photos
from remora.catalog.packages import Package, fetch, read_member
from remora.cli import models
from remora.errors import DataLossError, FailedPreconditionError, ResourceExhaustedError, UnavailableError


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("package/folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return stream.getvalue()


def npm(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called npm first on the path, and nothing else."""
    directory.mkdir()
    program = directory / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def serving(directory: Path, monkeypatch: pytest.MonkeyPatch, package: bytes) -> Package:
    """Have npm bring a package: what it is told goes into a file beside it."""
    made = directory / "made.tgz"
    made.write_bytes(package)
    script = (
        f'echo "$@" >> {directory}/told\nwhile [ "$1" != --pack-destination ]; do shift; done\ncp {made} "$2"/t.tgz'
    )
    npm(directory / "bin", monkeypatch, script)
    return Package("@some/thing@1.0.0", hashlib.sha256(package).hexdigest(), npm=True)


def test_a_package_is_fetched_once_by_its_hash_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = serving(tmp_path, monkeypatch, archive({"package/a.bin": b"abc"}))
    target = tmp_path / "target"
    target.mkdir()
    first, second = fetch([package, package], target)
    assert first == second == target / "t.tgz"
    assert [path.name for path in target.iterdir()] == ["t.tgz"]
    told = (tmp_path / "told").read_text().splitlines()
    assert len(told) == 1
    assert told[0].startswith("pack @some/thing@1.0.0 --silent --ignore-scripts")
    assert read_member(first, "package/a.bin", hashlib.sha256(b"abc").hexdigest()) == b"abc"
    for member, message in (("package/a.bin", "pinned is 0000"), ("b", "has no file b"), ("package/folder", "no file")):
        with pytest.raises(DataLossError, match=message):
            read_member(first, member, "0" * 64)


def test_another_package_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving(tmp_path, monkeypatch, archive({}))
    (tmp_path / "target").mkdir()
    with pytest.raises(DataLossError, match="other files than the pinned @some/thing"):
        fetch([Package("@some/thing@1.0.0", "0" * 64, npm=True)], tmp_path / "target")


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'npm error code E404' >&2; exit 1", UnavailableError, "E404"),
        ("exit 1", UnavailableError, "no message"),
        ("echo 'npm error code ENOSPC' >&2; exit 1", ResourceExhaustedError, "the disk is full"),
    ],
)
def test_what_npm_says_becomes_one_clear_line(
    script: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(error, match=message):
        fetch([Package("@some/thing@1.0.0", "0" * 64, npm=True)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_without_npm_all_but_its_models_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "recipe_names", lambda: ("centernet", "identity"))
    monkeypatch.setenv("PATH", str(tmp_path))
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    assert models.run(parser.parse_args(["build", "--all", "--dir", str(tmp_path)])) == 0
    said = capsys.readouterr()
    assert "identity: built" in said.out
    assert said.err == "centernet: left out, building it needs npm, which is not installed\n"
    with pytest.raises(FailedPreconditionError, match="comes from npm") as caught:
        models.run(parser.parse_args(["build", "centernet", "--dir", str(tmp_path)]))
    assert "install npm" in str(caught.value.fix)
    assert sorted(os.listdir(tmp_path)) == ["identity"]


def test_a_person_comes_out_of_the_source_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.b64encode(b"a picture")
    source = b"export const face: string = `AAAA`;\nexport const body = `\n" + text + b"`;\n"
    package = serving(tmp_path, monkeypatch, archive({"package/src/sample.ts": source}))
    monkeypatch.setattr(photos, "_PERSON", package)
    monkeypatch.setattr(photos, "_PERSON_SHA256", hashlib.sha256(source).hexdigest())
    place = photos.fetch_person(tmp_path / "photos")
    assert place.read_bytes() == b"a picture"
    monkeypatch.setenv("PATH", "")
    assert photos.fetch_person(tmp_path / "photos") == place
    assert os.listdir(tmp_path / "photos") == ["person.jpg"]
