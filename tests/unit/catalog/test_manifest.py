"""Manifests: what is wrong is named, with what is allowed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from remora.catalog import load_catalog
from remora.catalog.architectures import identity
from remora.catalog.manifest import parse_manifest
from remora.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError

TENSOR = 'name = "mine"\ntask = "tensor"\n'
PICTURES = 'name = "mine"\ntask = "classification"\nlabels = "labels.txt"\n[preprocess]\nwidth = 8\nheight = 8\n'


def put(directory: Path, text: str, *, labels: str | None = None, manifest: str = "manifest.toml") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest).write_text(text)
    (directory / "model.onnx").write_bytes(identity({}))
    if labels is not None:
        (directory / "labels.txt").write_text(labels, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        ('task = "tensor"', "name is missing"),
        ('name = "a"', "task is missing"),
        ('name = "Not Good"\ntask = "tensor"', "'Not Good' is not allowed"),
        ('name = "../up"\ntask = "tensor"', "is not allowed"),
        ('name = "a"\ntask = "dance"', "task is 'dance'"),
        (TENSOR + 'format = "exe"', "format is 'exe'"),
        (TENSOR + "file = 3", "file must be a string"),
        (TENSOR + 'file = "../other.onnx"', "file is '../other.onnx'"),
        (TENSOR + 'labels = "/etc/passwd"', "labels is '/etc/passwd'"),
        (TENSOR + 'sha256 = "abc"', "64 hex digits"),
        (TENSOR + 'colour = "red"', "unknown keys: colour"),
        (TENSOR + "preprocess = 1", "preprocess must be a table"),
        (TENSOR + "[batching]\nsize = 8", "no key .size.*rows, wait_ms, concurrent, threads"),
        (TENSOR + "[batching]\nthreads = 0", "threads is 0 .allowed are 1 to 64"),
        (TENSOR + 'format = "torchscript"\n[batching]\nthreads = 2', "TorchScript model runs on one thread"),
        (TENSOR + "[batching]\nrows = 0", "rows is 0 .allowed are 1 to 1024"),
        (TENSOR + "[batching]\nrows = 8.5", "rows is 8.5"),
        (TENSOR + "[batching]\nwait_ms = -1", "wait_ms is -1"),
        (TENSOR + "[batching]\nconcurrent = true", "concurrent is True"),
        ('name = "a"\ntask = "classification"', "needs \\[preprocess\\]"),
        ('name = "a"\ntask = "depth"', "needs \\[preprocess\\]"),
        ('name = "a"\ntask = "pose"\n[preprocess]\nwidth = 8', "pose model needs labels"),
        (TENSOR + '[boxes]\nunit = "share"', "has no such table"),
        (
            'name = "a"\ntask = "detection"\nlabels = "l.txt"\n[preprocess]\nwidth = 8\n[map]\nlayout = "nchw"',
            "which has \\[boxes\\]",
        ),
        (TENSOR + 'format = "torchscript"', "must pin it"),
    ],
)
def test_a_wrong_manifest_names_the_file_and_the_key(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        parse_manifest(text.encode(), "here.toml")
    assert "here.toml" in caught.value.message


def test_a_manifest_beside_a_model_is_all_it_takes(tmp_path: Path) -> None:
    put(tmp_path / "mine", TENSOR)
    entry = load_catalog(tmp_path)["mine"]
    assert entry.source.key == "mine"
    assert entry.source.digest == f"sha256:{hashlib.sha256(identity({})).hexdigest()}"
    assert entry.source.task == "tensor"
    assert entry.info.size_bytes == len(identity({}))


def test_manifests_may_lie_side_by_side(tmp_path: Path) -> None:
    put(tmp_path, TENSOR, manifest="one.toml")
    put(tmp_path, TENSOR.replace("mine", "other"), manifest="two.toml")
    assert set(load_catalog(tmp_path)) == {"mine", "other"}


def test_a_directory_that_is_not_there_is_an_empty_catalogue(tmp_path: Path) -> None:
    assert load_catalog(tmp_path / "nowhere") == {}


def test_an_unfinished_build_is_not_part_of_the_catalogue(tmp_path: Path) -> None:
    put(tmp_path / ".build-x" / "mine", TENSOR)
    put(tmp_path / ".build-x", TENSOR)
    assert load_catalog(tmp_path) == {}


def test_labels_are_read_in_order(tmp_path: Path) -> None:
    put(tmp_path / "mine", PICTURES, labels="cat\ndog, hound\nKüken\n")
    entry = load_catalog(tmp_path)["mine"]
    assert entry.labels == ("cat", "dog, hound", "Küken")
    assert entry.source.manifest["labels"] == entry.labels
    assert entry.source.manifest["preprocess"]["width"] == 8


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a", PICTURES)
    with pytest.raises(NotFoundError, match=r"labels\.txt"):
        load_catalog(tmp_path)
    (tmp_path / "a" / "labels.txt").touch()
    with pytest.raises(InvalidArgumentError, match="has no labels"):
        load_catalog(tmp_path)
    (tmp_path / "a" / "model.onnx").unlink()
    with pytest.raises(NotFoundError, match=r"model\.onnx"):
        load_catalog(tmp_path)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a", TENSOR)
    put(tmp_path / "b", TENSOR)
    with pytest.raises(AlreadyExistsError, match="'mine'"):
        load_catalog(tmp_path)
