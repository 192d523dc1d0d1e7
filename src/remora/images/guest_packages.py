"""Fetches the distribution packages that the guest OS image is made of.

apt itself resolves and verifies them, from whatever sources the host has configured, so Remora names no server and
trusts no other key. The resolver is shown an empty package status: the host's own installed packages must not change
what goes into the guest. Nothing is installed; packages are only unpacked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from remora.errors import FailedPreconditionError, ResourceExhaustedError

#: Kernels made for virtual machines: Debian's first, then Ubuntu's.
KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic")
ROOT_PACKAGES = ("python3-minimal", "libpython3-stdlib", "crun", "busybox-static")
#: Dependencies of maintainer scripts, which never run here. Everything else of the closure is unpacked.
_WANTED = re.compile(r"linux-(image|modules)-\d|lib|zlib1g|python3\.\d+-minimal|crun$|busybox-static$")
_UNWANTED = re.compile(r"lib(ssl|crypto|acl|bz2|selinux|pcre|md\d|apt|debconf|pam|audit|kmod|klibc|blkid|mount|uuid)")
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    architecture: str

    @property
    def file_name(self) -> str:
        """The name apt gives the downloaded file: the epoch's colon is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def _run(argv: list[str], *, cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FailedPreconditionError(
            f"building the guest OS image needs {argv[0]}, which is not installed",
            fix="on Debian or Ubuntu run scripts/system-packages.sh; elsewhere copy an image built there",
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        if "No space left" in done.stderr:
            raise ResourceExhaustedError("the guest OS packages do not fit on the disk", fix="free some space")
        raise FailedPreconditionError(
            f"{argv[0]} failed while fetching the guest OS packages: {last}",
            fix="run apt-get update, check the network and the apt sources, and try again",
        )
    return done.stdout


def kernel_package() -> str:
    """Return the name of the kernel package that the configured sources offer."""
    if platform.machine() != "x86_64":
        raise FailedPreconditionError(
            f"the guest OS image is built for x86_64; this machine is {platform.machine()}",
            fix="build and run microVMs on an x86_64 host",
        )
    for name in KERNEL_PACKAGES:
        shown = _run(["apt-cache", "policy", name])
        if "Candidate:" in shown and "Candidate: (none)" not in shown:
            return name
    raise FailedPreconditionError(
        f"the apt sources offer none of {', '.join(KERNEL_PACKAGES)}",
        fix="run apt-get update; if it still fails, add the distribution's main section to the apt sources",
    )


def resolve(scratch: Path) -> list[Package]:
    """Return the packages to unpack, sorted by name; what the host has installed plays no part."""
    status = scratch / "status"
    status.write_bytes(b"")
    listing = _run(
        [
            "apt-get",
            "-qq",
            "--print-uris",
            "-o",
            f"Dir::State::status={status}",
            "-o",
            "APT::Install-Recommends=false",
            "-o",
            "Debug::NoLocking=true",
            "install",
            kernel_package(),
            *ROOT_PACKAGES,
        ]
    )
    return parse_uris(listing)


def parse_uris(listing: str) -> list[Package]:
    """Return the packages of `apt-get --print-uris` output that the guest needs (format: apt-get(8))."""
    found: dict[str, Package] = {}
    for line in listing.splitlines():
        fields = line.split()
        if len(fields) < 3 or not fields[1].endswith(".deb"):
            continue
        name, version, architecture = unquote(fields[1]).removesuffix(".deb").split("_", 2)
        if _WANTED.match(name) and not _UNWANTED.match(name) and _NAME.fullmatch(name):
            found[name] = Package(name, version, architecture)
    return [found[name] for name in sorted(found)]


def fetch(packages: list[Package], folder: Path) -> dict[str, str]:
    """Download into `folder` what is not there yet; return each file's SHA-256 by package name."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (folder / package.file_name).is_file()]
    if missing:
        # As root apt would drop to a user who cannot write here, and warn about it.
        sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        wanted = [f"{package.name}={package.version}" for package in missing]
        _run(["apt-get", "-qq", *sandbox, "download", *wanted], cwd=folder)
    digests = {}
    for package in packages:
        path = folder / package.file_name
        if not path.is_file():
            raise FailedPreconditionError(
                f"apt downloaded {package.name} {package.version}, but {path.name} is not there",
                fix="run apt-get update and try again",
            )
        digests[package.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def unpack(packages: list[Package], folder: Path, tree: Path) -> None:
    """Unpack the packages' files into `tree`; no maintainer script runs."""
    tree.mkdir(parents=True, exist_ok=True)
    for package in packages:
        _run(["dpkg-deb", "-x", str(folder / package.file_name), str(tree)])
    # A distribution with merged /usr ships libc below /lib: bring both together as it does at run time.
    for name in ("lib", "lib64", "bin", "sbin"):
        top = tree / name
        if top.is_dir() and not top.is_symlink():
            shutil.copytree(top, tree / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(top)
            top.symlink_to(f"usr/{name}")
