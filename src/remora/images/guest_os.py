"""Builds the guest OS image: the one kernel, initrd and read-only root that all microVMs share.

The image is named by the digest of its recipe (package versions, Remora's guest sources, this builder) and built once
into `guest/<digest>/` below the state directory; the folder appears whole or not at all. The same inputs give the same
bytes, so two hosts can compare what their guests run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remora.errors import FailedPreconditionError
from remora.images import guest_packages
from remora.images.guest_cpio import Archive
from remora.images.guest_kernel import Modules, vmlinux
from remora.images.guest_packages import Package
from remora.images.guest_root import build_root

#: Raised when the builder changes what it makes from the same inputs.
RECIPE = 1
#: Modules by purpose; what they depend on is found in the modules themselves.
MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "erofs",
    "virtio_console",
    "overlay",
    "virtio-rng",
)
#: Loaded only in pods' microVMs: they cost each boot some milliseconds.
POD_MODULES = ("virtio_net", "virtio_balloon")
#: Loaded only where the monitor has a vsock device for the channel.
VSOCK_MODULES = ("vmw_vsock_virtio_transport",)
_FSTAB = """\
proc /new/proc proc nosuid,nodev,noexec 0 0
sys /new/sys sysfs nosuid,nodev,noexec 0 0
dev /new/dev devtmpfs nosuid 0 0
cgroup2 /new/sys/fs/cgroup cgroup2 nosuid,nodev,noexec 0 0
run /new/run tmpfs nosuid,nodev,mode=755 0 0
tmp /new/tmp tmpfs nosuid,nodev 0 0
"""
#: Same for every build: a random one would change the image's bytes.
_UUID = "72656d6f-7261-4000-8000-6775657374a1"
#: Parts of the remora package that run in the guest; their bytes belong to the recipe.
PACKAGE_PARTS = ("__init__.py", "aio.py", "errors.py", "reactor.py", "wire", "client", "vaccel", "guest")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class GuestImage:
    kernel: Path  # uncompressed ELF with a PVH entry
    initrd: Path
    disk: Path  # erofs; attach read-only with serial remora-os
    digest: str  # of the recipe
    manifest: Path


def recipe_digest(packages: list[Package], package_folder: Path) -> str:
    """Return the name of the image that these packages and sources make."""
    state = hashlib.sha256(f"{RECIPE}\n{MODULES}\n{POD_MODULES}\n{VSOCK_MODULES}\n{_FSTAB}\n".encode())
    for package in packages:
        state.update(f"{package.name} {package.version} {package.architecture}\n".encode())
    builder = Path(__file__).parent
    sources = sorted(builder.glob("guest_*.py"))
    for part in PACKAGE_PARTS:
        path = package_folder / part
        sources += sorted(p for p in path.rglob("*") if p.suffix in (".py", ".sh")) if path.is_dir() else [path]
    for path in sources:
        base = builder if path.is_relative_to(builder) else package_folder
        state.update(f"{path.relative_to(base)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()


def build_guest_image(state_dir: Path, *, force: bool = False, progress: Progress | None = None) -> GuestImage:
    """Return the guest OS image, building it first if this recipe has not been built (or if `force`).

    Args:
        state_dir: where Remora keeps state (`paths.state_dir()`).
        force: build again even if the image is there.
        progress: called with what is being done and the fraction done, 0 to 1.

    Raises:
        FailedPreconditionError: a tool or package is missing; `fix` says which.
    """
    report: Progress = progress or (lambda _step, _fraction: None)
    package_folder = Path(__file__).resolve().parent.parent
    base = state_dir / "guest"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=base) as scratch_name:
        scratch = Path(scratch_name)
        report("choosing packages", 0.0)
        packages = guest_packages.resolve(scratch)
        digest = recipe_digest(packages, package_folder)
        folder = base / digest[:16]
        if not force and (image := _existing(folder, digest)):
            report("guest OS image is up to date", 1.0)
            return image
        report("downloading packages", 0.1)
        archives = base / "packages"
        hashes = guest_packages.fetch(packages, archives)
        report("unpacking packages", 0.3)
        tree = scratch / "tree"
        guest_packages.unpack(packages, archives, tree)
        built = scratch / "image"
        built.mkdir()
        report("extracting the kernel", 0.5)
        modules = _kernel(tree, built)
        report("writing the initrd", 0.6)
        initrd = build_initrd(modules, tree / "usr/bin/busybox", package_folder / "guest/init.sh")
        (built / "initrd").write_bytes(initrd)
        report("laying out the OS disk", 0.65)
        build_root(tree, package_folder, scratch / "root")
        report("packing the OS disk", 0.9)
        _pack(scratch / "root", built / "disk.erofs")
        _write_manifest(built, digest, modules.release, packages, hashes)
        _replace(built, folder)
        report("guest OS image built", 1.0)
    image = _existing(folder, digest)
    if image is None:
        raise FailedPreconditionError(f"the image in {folder} vanished while it was built", fix="try again")
    return image


def build_initrd(modules: Modules, busybox: Path, init: Path) -> bytes:
    """Return the initrd: busybox, `init` and the modules that lead to the OS disk and the channel."""
    order = modules.load_order(MODULES)
    extras = {
        "modules.pod": [name for name in modules.load_order(POD_MODULES) if name not in order],
        "modules.vsock": [name for name in modules.load_order(VSOCK_MODULES) if name not in order],
    }
    everything = (*order, *dict.fromkeys(name for names in extras.values() for name in names))
    archive = Archive()
    library = f"lib/modules/{modules.release}"
    for name in ("bin", "dev", "sys", "proc", "new", "lib", "lib/modules", library):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("init", init.read_bytes(), 0o755)
    archive.file("fstab", _FSTAB.encode())
    archive.file("modules", (" ".join(order) + "\n").encode())
    for file, names in extras.items():
        archive.file(file, (" ".join(names) + "\n").encode())
    archive.file(f"{library}/modules.dep", "".join(f"{name}.ko:\n" for name in everything).encode())
    for name in everything:
        archive.file(f"{library}/{name}.ko", modules.image(name))
    return archive.to_bytes()


def _kernel(tree: Path, built: Path) -> Modules:
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise FailedPreconditionError("the kernel package holds no /boot/vmlinuz-*")
    (built / "vmlinux").write_bytes(vmlinux(kernels[-1].read_bytes()))
    return Modules(tree / "usr/lib/modules" / kernels[-1].name.removeprefix("vmlinuz-"))


def _pack(root: Path, disk: Path) -> None:
    argv = ["mkfs.erofs", "-d0", "-T0", f"-U{_UUID}", "--all-root", "-x-1", str(disk), str(root)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FailedPreconditionError("mkfs.erofs is not installed", fix="install erofs-utils") from error
    if done.returncode != 0:
        raise FailedPreconditionError(f"mkfs.erofs failed: {(done.stderr or done.stdout).strip()}")


def _write_manifest(built: Path, digest: str, release: str, packages: list[Package], hashes: dict[str, str]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(built.iterdir())
    }
    manifest = {
        "digest": digest,
        "kernel": release,
        "files": files,
        "packages": {p.name: {"version": p.version, "sha256": hashes[p.name]} for p in packages},
    }
    (built / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _existing(folder: Path, digest: str) -> GuestImage | None:
    image = GuestImage(
        kernel=folder / "vmlinux",
        initrd=folder / "initrd",
        disk=folder / "disk.erofs",
        digest=digest,
        manifest=folder / "manifest.json",
    )
    files = (image.kernel, image.initrd, image.disk, image.manifest)
    return image if all(path.is_file() for path in files) else None


def _replace(built: Path, folder: Path) -> None:
    """Put the finished image in place; a running microVM keeps the files of an image it replaces open."""
    for path in built.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        old = built.parent / "old"
        folder.rename(old)
        built.rename(folder)
        shutil.rmtree(old)
    else:
        try:
            built.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # otherwise another process has just built the same image
