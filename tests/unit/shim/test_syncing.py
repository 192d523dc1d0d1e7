"""Copies of volumes: what is sent of a change, and in which order, so that a reader never sees a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from remora.errors import ResourceExhaustedError
from remora.shim import syncing
from remora.shim.syncing import Copies
from remora.shim.volumes import Volume
from remora.wire.guest_pod_v1 import MAX_PART_BYTES, PutFilesRequest


@pytest.fixture
def sent() -> list[PutFilesRequest]:
    return []


def config_map(folder: Path, stamp: str, text: str) -> None:
    (folder / stamp).mkdir(parents=True)
    (folder / stamp / "key").write_text(text)
    (folder / "..tmp").symlink_to(stamp)
    (folder / "..tmp").rename(folder / "..data")
    if not (folder / "key").is_symlink():
        (folder / "key").symlink_to("..data/key")


def test_a_change_sends_new_files_first_then_turns_the_link_then_removes(
    tmp_path: Path, sent: list[PutFilesRequest]
) -> None:
    volume = Volume("v", "synced", str(tmp_path))
    config_map(tmp_path, "..1", "old")
    copies = Copies(sent.append)
    copies.add(volume)
    assert copies.changed() == []
    config_map(tmp_path, "..2", "new")
    for path in ((tmp_path / "..1" / "key"),):
        path.unlink()
    (tmp_path / "..1").rmdir()
    assert copies.changed() == [volume]
    sent.clear()
    copies.update(volume)
    (request,) = sent
    assert [(file.path, file.kind) for file in request.files] == [
        ("..2", "dir"),
        ("..2/key", "file"),
        ("..data", "link"),
    ]
    assert set(request.remove) == {"..1", "..1/key"}
    assert copies.changed() == []


def test_a_large_file_goes_in_parts_and_a_too_large_volume_is_refused(
    tmp_path: Path, sent: list[PutFilesRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").write_bytes(b"x" * (2 * MAX_PART_BYTES + 5))
    volume = Volume("v", "synced", str(tmp_path))
    Copies(sent.append).add(volume)
    parts = [file for request in sent for file in request.files if file.kind == "file"]
    assert [(part.offset, len(part.content)) for part in parts] == [
        (0, MAX_PART_BYTES),
        (MAX_PART_BYTES, MAX_PART_BYTES),
        (2 * MAX_PART_BYTES, 5),
    ]
    monkeypatch.setattr(syncing, "MAX_VOLUME_BYTES", MAX_PART_BYTES)
    with pytest.raises(ResourceExhaustedError, match="a copied one may have"):
        Copies(sent.append).add(volume)


def test_a_file_that_goes_back_to_the_host_is_not_sent_again(tmp_path: Path, sent: list[PutFilesRequest]) -> None:
    file = tmp_path / "message"
    file.touch()
    volume = Volume("v", "synced", str(file), is_file=True, returned=True)
    copies = Copies(sent.append)
    copies.add(volume)
    syncing.bring_back(volume, b"bye")
    assert file.read_text() == "bye"
    assert copies.changed() == []
