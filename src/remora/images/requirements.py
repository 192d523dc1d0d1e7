"""Installs a function's Python requirements for the Python of its image, which need not be the one that runs here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from remora.errors import FailedPreconditionError, UnavailableError
from remora.images.model import machine_architecture
from remora.images.store import remove_tree
from remora.images.tools import leashed
from remora.images.tree_tar import LowerLayers

_WHEEL_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}
#: Wheels name the oldest glibc they need; Debian 12 has 2.36. pip takes the list as it is, newest first.
_GLIBC_MINORS = (36, 35, 34, 33, 31, 28, 27, 26, 24, 17)


def image_python(lower: LowerLayers) -> tuple[str, str]:
    """Return (version such as 3.11, directory of its installed packages) of the Python in the layers.

    Raises:
        FailedPreconditionError: there is none.
    """
    for directory, packages in (("/usr/local/bin", "site-packages"), ("/usr/bin", "dist-packages")):
        versions = [m[1] for name in lower.names(directory) if (m := re.fullmatch(r"python(3\.\d+)", name))]
        if versions:
            newest = max(versions, key=lambda version: int(version[2:]))
            return newest, f"/usr/local/lib/python{newest}/{packages}"
    raise FailedPreconditionError(
        "the image has Python requirements but no Python", fix="add python3-minimal to packages in [image]"
    )


def install_requirements(requirements: Path, version: str, target: Path) -> None:
    """Install into the directory `target` with pip, wheels only; hashes are required as soon as one is given.

    Raises:
        UnavailableError: pip could not find or fetch something; the message has its reason.
    """
    machine = _WHEEL_MACHINE.get(machine_architecture(), machine_architecture())
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS] + [f"manylinux2014_{machine}"]
    argv = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
        "--no-compile", "--only-binary=:all:", "--implementation=cp", f"--python-version={version}",
        *(f"--platform={platform}" for platform in platforms),
        f"--target={target}", f"--requirement={requirements}",
    ]  # fmt: skip
    if "--hash=" in requirements.read_text():
        argv.append("--require-hashes")
    done = subprocess.run(leashed(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
            -2:
        ]
        raise UnavailableError(
            f"pip could not install {requirements} for Python {version}: "
            + " ".join(reason.removeprefix("ERROR: ") for reason in reasons[-2:]),
            fix="only wheels can be installed; check names, versions and hashes",
        )
    # Scripts carry the path of the Python that ran pip, which does not exist in the image.
    remove_tree(target / "bin")
    if sys.version_info[:2] == tuple(int(part) for part in version.split(".")):
        argv = [sys.executable, "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
        # A package may carry files for other versions, which do not compile; they are imported from source, if ever.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        subprocess.run([*argv, "-s", str(target), str(target)], check=False, capture_output=True, env=environment)
