"""The guest OS image's parts: package choice, kernel, modules, initrd, libraries, recipe."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.images import guest_kernel, guest_os, guest_packages
from remora.images.guest_cpio import Archive
from remora.images.guest_kernel import Modules
from remora.images.guest_packages import Package
from remora.images.guest_root import needed_libraries

URIS = """\
'scheme://host/l/linux/linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb' linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb 26713492 MD5Sum:0
'scheme://host/c/crun_1.8.1-1%2bdeb12u1_amd64.deb' crun_1.8.1-1+deb12u1_amd64.deb 289288 MD5Sum:0
'scheme://host/b/busybox-static_1%3a1.35.0-4_amd64.deb' busybox-static_1%3a1.35.0-4_amd64.deb 928188
'scheme://host/i/initramfs-tools_0.142_all.deb' initramfs-tools_0.142_all.deb 76104 MD5Sum:0
'scheme://host/l/libc6_2.36-9_amd64.deb' libc6_2.36-9_amd64.deb 2759320 MD5Sum:0
"""  # noqa: E501


def elf(kind: str = "dynamic", names: tuple[str, ...] = ()) -> bytes:
    """Return a minimal 64-bit ELF file that needs `names`."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets, position = [], 1
    for name in names:
        offsets.append(position)
        position += len(name) + 1
    at = 64 + 2 * 56
    dynamic = b"".join(struct.pack("<QQ", 1, offset) for offset in offsets)
    dynamic += struct.pack("<QQ", 5, 0x1000 + at) + struct.pack("<QQ", 0, 0)
    start = at + len(strings)
    header = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    size = start + len(dynamic)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, 0x1000, 0x1000, size, size, 4096)
    table = struct.pack("<IIQQQQQQ", 2 if kind == "dynamic" else 4, 4, start, 0, 0, len(dynamic), len(dynamic), 8)
    return header + load + table + strings + dynamic


def test_the_packages_are_the_kernel_and_what_pid_1_runs_on() -> None:
    packages = guest_packages.parse_uris(URIS)
    assert [package.name for package in packages] == [
        "busybox-static",
        "crun",
        "libc6",
        "linux-image-6.1.0-56-cloud-amd64",
    ]
    assert packages[0].version == "1:1.35.0-4"
    assert packages[0].file_name == "busybox-static_1%3a1.35.0-4_amd64.deb"


def test_a_missing_tool_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"apt-cache.*not installed.*system-packages"):
        guest_packages.resolve(tmp_path)


def test_the_libraries_an_elf_file_needs_are_read_from_it() -> None:
    assert needed_libraries(elf(names=("libc.so.6", "libz.so.1"))) == ["libc.so.6", "libz.so.1"]
    assert needed_libraries(elf("static")) == []
    assert needed_libraries(b"#!/bin/sh\n") == []


def test_modules_come_after_what_they_depend_on_and_built_in_ones_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "6.1.0"
    folder.mkdir()
    for name, needs in (("erofs", "libcrc32c"), ("libcrc32c", ""), ("virtio-rng", "virtio"), ("overlay", "")):
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + needs.encode() + b"\0rest")
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    modules = Modules(folder)
    assert modules.load_order(["erofs", "virtio-rng", "virtio"]) == ["libcrc32c", "erofs", "virtio_rng"]
    with pytest.raises(FailedPreconditionError, match="no module fuse"):
        modules.load_order(["fuse"])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_a_compressed_module_is_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "6.8.0"
    folder.mkdir()
    plain = b"\x7fELF\0depends=\0"
    packed = subprocess.run(["zstd", "-q", "-c"], input=plain, capture_output=True, check=True).stdout
    (folder / "erofs.ko.zst").write_bytes(packed)
    assert Modules(folder).image("erofs") == plain


def test_a_modules_signature_is_cut_off() -> None:
    signature = b"s" * 300
    info = struct.pack(">8xI", len(signature))
    signed = b"ELF module" + signature + info + b"~Module signature appended~\n"
    assert guest_kernel.strip_signature(signed) == b"ELF module"
    assert guest_kernel.strip_signature(b"unsigned") == b"unsigned"


@pytest.mark.skipif(shutil.which("lz4") is None, reason="lz4 is not installed")
def test_the_elf_kernel_is_cut_out_of_a_bzimage() -> None:
    kernel = b"\x7fELF" + b"k" * 1000 + struct.pack("<III", 4, 8, 18) + b"Xen\0"
    payload = subprocess.run(["lz4", "-l", "-c"], input=kernel, capture_output=True, check=True).stdout
    payload += struct.pack("<I", len(kernel))
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    assert guest_kernel.vmlinux(bytes(image) + payload) == kernel
    with pytest.raises(InvalidArgumentError, match="HdrS"):
        guest_kernel.vmlinux(bytes(2048))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("dir")
    archive.file("dir/file", b"content", 0o640)
    archive.link("dir/link", "file")
    data = archive.to_bytes()
    assert len(data) % 512 == 0
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "dir/link").read_bytes() == b"content"
    assert (tmp_path / "dir/file").stat().st_mode & 0o777 == 0o640


def test_the_recipe_names_every_input(tmp_path: Path) -> None:
    package = tmp_path / "remora"
    for name in guest_os.PACKAGE_PARTS:
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name) if path.suffix else path.mkdir()
    (package / "guest/main.py").write_text("main")
    (package / "guest/init.sh").write_text("init")
    packages = [Package("crun", "1", "amd64")]
    first = guest_os.recipe_digest(packages, package)
    assert guest_os.recipe_digest(packages, package) == first
    assert guest_os.recipe_digest([Package("crun", "2", "amd64")], package) != first
    (package / "guest/init.sh").write_text("changed")
    assert guest_os.recipe_digest(packages, package) != first
