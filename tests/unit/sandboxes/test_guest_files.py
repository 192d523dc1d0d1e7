"""Which guest OS image microVMs boot: asking the package manager each time would cost them a second."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from remora.images import guest_os
from remora.sandboxes.guest_files import guest_files, renew_guest_files


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the images that were built; each build makes another one."""
    built: list[Path] = []

    def build(state_dir: Path, **_: object) -> SimpleNamespace:
        folder = state_dir / "guest" / str(len(built))
        folder.mkdir(parents=True)
        for name in ("kernel", "initrd", "disk"):
            (folder / name).touch()
        built.append(folder)
        return SimpleNamespace(kernel=folder / "kernel", initrd=folder / "initrd", disk=folder / "disk")

    monkeypatch.setattr(guest_os, "build_guest_image", build)
    return built


def test_the_image_is_asked_for_once(builds: list[Path], tmp_path: Path) -> None:
    assert guest_files(tmp_path) == guest_files(tmp_path)
    assert len(builds) == 1


def test_an_image_whose_files_are_gone_is_built_again(builds: list[Path], tmp_path: Path) -> None:
    guest_files(tmp_path).disk.unlink()
    assert guest_files(tmp_path).disk.is_file()
    assert len(builds) == 2


def test_renewing_changes_what_the_next_microvm_boots(builds: list[Path], tmp_path: Path) -> None:
    first = guest_files(tmp_path)
    renewed = renew_guest_files(tmp_path)
    assert renewed != first
    assert guest_files(tmp_path) == renewed
    assert len(builds) == 2
