"""Models and pictures from paths, files and buffers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from remora.client.source import Source, read_picture
from remora.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError, RemoraError

DATA = bytes(range(256)) * 40


@pytest.fixture(params=["path", "text path", "bytes", "bytearray", "memoryview"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    path = tmp_path / "model"
    path.write_bytes(DATA)
    forms = {
        "path": path,
        "text path": str(path),
        "bytes": DATA,
        "bytearray": bytearray(DATA),
        "memoryview": memoryview(DATA),
    }
    return Source(forms[request.param])


def test_every_source_has_the_same_digest_and_chunks(source: Source) -> None:
    assert source.digest == "sha256:" + hashlib.sha256(DATA).hexdigest()
    assert source.size_bytes == len(DATA)
    chunks = list(source.chunks(1000, 4096))
    assert chunks[0][0] == 1000
    assert b"".join(bytes(data) for _offset, data in chunks) == DATA[1000:]
    source.check_unchanged()


def test_a_file_that_changed_since_is_not_sent_under_the_old_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(DATA)
    source = Source(path)
    path.write_bytes(b"other" + DATA)
    with pytest.raises(FailedPreconditionError, match="has changed"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(FailedPreconditionError, match="cannot be read"):
        source.check_unchanged()


def test_a_file_that_is_cut_short_while_it_is_sent_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(DATA)
    source = Source(path)
    path.write_bytes(DATA[:10])
    with pytest.raises(AbortedError, match="cut short"):
        list(source.chunks(0, 4096))


@pytest.mark.parametrize("origin", [b"", 7, None, memoryview(DATA)[::2]])
def test_what_cannot_be_a_model_is_refused(origin: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        Source(origin)


def test_a_missing_model_file_and_a_directory_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RemoraError, match=str(path)):
            Source(path)


def test_a_picture_comes_from_a_path_a_file_or_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        for image in (path, str(path), file, io.BytesIO(DATA), DATA, bytearray(DATA), memoryview(DATA)):
            assert bytes(read_picture(image)) == DATA


@pytest.mark.parametrize("image", [7, None, io.StringIO("text"), memoryview(DATA)[::2]])
def test_what_cannot_be_a_picture_is_refused(image: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_picture(image)
    assert caught.value.fix


def test_a_missing_picture_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        read_picture(tmp_path / "absent")
