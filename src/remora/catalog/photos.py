"""Twenty ImageNet photographs with their true classes, for the demo, the benchmark and the tests.

They come out of a pinned package (foolbox, MIT) when they are needed: ImageNet's photographs are for research use, so
they are never part of this repository. The class is the number at the end of each file's name.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from remora import paths
from remora.catalog.packages import Package, Report, fetch, quiet, read_member
from remora.errors import DataLossError, FailedPreconditionError

_PACKAGE = Package("foolbox==3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")
_MEMBERS = "foolbox/data/imagenet_"
COUNT = 20


@dataclass(frozen=True)
class Photo:
    path: Path
    class_index: int

    @property
    def name(self) -> str:
        return self.path.stem


def photos_dir() -> Path:
    return paths.state_dir() / "photos"


def fetch_photos(directory: Path | None = None, report: Report = quiet) -> list[Photo]:
    """Return the photographs in order, downloading them if they are not there.

    Raises:
        UnavailableError: the download failed.
        DataLossError: the package is not the pinned one.
        FailedPreconditionError: the directory cannot be written.
    """
    directory = directory or photos_dir()
    found = _present(directory)
    if len(found) == COUNT:
        return found
    report("download")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".photos-", dir=directory.parent) as scratch:
            (wheel,) = fetch([_PACKAGE], Path(scratch))
            directory.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith(_MEMBERS) and name.endswith(".jpg")]
            for member in members:
                part = Path(scratch) / "part"
                part.write_bytes(read_member(wheel, member))
                os.replace(part, directory / member.removeprefix(_MEMBERS))
    except OSError as error:
        raise FailedPreconditionError(
            f"cannot write to {directory}: {error.strerror or error}",
            fix="free space, or set REMORA_STATE_DIR to a directory that you may write",
        ) from error
    found = _present(directory)
    if len(found) != COUNT:
        raise DataLossError(f"{_PACKAGE.requirement} has {len(found)} photographs, expected are {COUNT}")
    return found


def _present(directory: Path) -> list[Photo]:
    return [Photo(path, int(path.stem.rpartition("_")[2])) for path in sorted(directory.glob("[0-9][0-9]_*.jpg"))]
