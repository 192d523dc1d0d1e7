"""Photographs for the demo, the benchmark and the tests: twenty with their ImageNet classes, and one of a person.

They come out of pinned packages when they are needed, and are never part of this repository: ImageNet's (foolbox, MIT)
are for research use. The class is the number at the end of each file's name. The person (@vladmandic/human, MIT) is
what that package tries its models with; its source holds the picture in base64.
"""

from __future__ import annotations

import base64
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
_PERSON = Package(
    "@vladmandic/human@3.3.6", "425e9c51dbbca0c8934362b170cb0d54c2529c11c654b3c03092b16e9d6ad3f7", npm=True
)
_PERSON_MEMBER = "package/src/sample.ts"
_PERSON_SHA256 = "5e6e03412f8b1a653865c45a4ae9be7078a8adc4ccea46189db717c08d827145"
_PERSON_BEGINS, _PERSON_ENDS = b"export const body = `", b"`"


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
        raise _cannot_write(directory, error) from error
    found = _present(directory)
    if len(found) != COUNT:
        raise DataLossError(f"{_PACKAGE.requirement} has {len(found)} photographs, expected are {COUNT}")
    return found


def fetch_person(directory: Path | None = None, report: Report = quiet) -> Path:
    """Return the photograph of a whole person, 1200x1200, downloading it if it is not there.

    Raises:
        FailedPreconditionError: npm is not installed, or the directory cannot be written.
        UnavailableError: the download failed.
        DataLossError: the package is not the pinned one.
    """
    place = (directory or photos_dir()) / "person.jpg"
    if place.exists():
        return place
    report("download")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".photos-", dir=place.parent) as scratch:
            (package,) = fetch([_PERSON], Path(scratch))
            source = read_member(package, _PERSON_MEMBER, _PERSON_SHA256)
            begin = source.index(_PERSON_BEGINS) + len(_PERSON_BEGINS)
            part = Path(scratch) / "part"
            part.write_bytes(base64.b64decode(source[begin : source.index(_PERSON_ENDS, begin)]))
            os.replace(part, place)
    except OSError as error:
        raise _cannot_write(place.parent, error) from error
    return place


def _cannot_write(directory: Path, error: OSError) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"cannot write to {directory}: {error.strerror or error}",
        fix="free space, or set REMORA_STATE_DIR to a directory that you may write",
    )


def _present(directory: Path) -> list[Photo]:
    return [Photo(path, int(path.stem.rpartition("_")[2])) for path in sorted(directory.glob("[0-9][0-9]_*.jpg"))]
