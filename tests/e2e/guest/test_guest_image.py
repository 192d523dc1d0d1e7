"""The guest OS image is built once, whole, small, and the same from the same inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remora.images.guest_os import GuestImage, build_guest_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_the_same_inputs_give_the_same_bytes_and_a_finished_image_is_not_built_again(
    guest_image: GuestImage, tmp_path: Path
) -> None:
    packages = tmp_path / "guest/packages"
    packages.parent.mkdir()
    packages.symlink_to(guest_image.disk.parent.parent / "packages")  # no second download
    again = build_guest_image(tmp_path)
    first, second = (json.loads(image.manifest.read_text()) for image in (guest_image, again))
    assert again.digest == guest_image.digest
    assert second == first  # sizes and SHA-256 of every file, versions and SHA-256 of every package
    steps: list[tuple[str, float]] = []
    stamp = again.disk.stat()
    build_guest_image(tmp_path, progress=lambda step, fraction: steps.append((step, fraction)))
    assert again.disk.stat() == stamp
    assert steps[-1][1] == 1.0
    assert [path.name for path in (tmp_path / "guest").glob(".build-*")] == []


def test_the_image_is_small(guest_image: GuestImage) -> None:
    assert guest_image.initrd.stat().st_size < 4_000_000
    assert guest_image.disk.stat().st_size < 24_000_000
