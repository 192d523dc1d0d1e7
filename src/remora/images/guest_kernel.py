"""The guest's kernel and its modules, taken out of a distribution's kernel package.

A VMM that speaks PVH starts the uncompressed ELF directly, which saves the guest its own decompression (half a second
of emulated CPU), and Firecracker accepts nothing else. Distributions ship only the compressed bzImage, so the ELF is
cut out of it (Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset and payload_length at 0x248).
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from remora.errors import FailedPreconditionError, InvalidArgumentError

#: Payload magic -> decompressor. All but gzip are followed by four bytes that hold the unpacked size.
_DECOMPRESSORS = {
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
    b"\xfd7zX": "xz",
}
_SIGNATURE = b"~Module signature appended~\n"
#: Xen's note type for the PVH entry point (xen/include/public/elfnote.h).
_PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0"
_PVH_NOTE_64 = struct.pack("<III", 4, 8, 18) + b"Xen\0"


def decompress(tool: str, data: bytes) -> bytes:
    """Return `data` unpacked by lz4, zstd, gzip or xz."""
    try:
        done = subprocess.run([tool, "-dc"], input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise FailedPreconditionError(
            f"the distribution's kernel is compressed with {tool}, which is not installed", fix=f"install {tool}"
        ) from error
    if done.returncode != 0:
        raise InvalidArgumentError(f"{tool} cannot unpack the kernel: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def vmlinux(bzimage: bytes) -> bytes:
    """Return the uncompressed ELF kernel inside a bzImage."""
    if bzimage[0x202:0x206] != b"HdrS":
        raise InvalidArgumentError("the kernel file is no bzImage: it lacks the HdrS magic")
    setup_bytes = ((bzimage[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[setup_bytes + offset : setup_bytes + offset + length]
    for magic, tool in _DECOMPRESSORS.items():
        if payload.startswith(magic):
            elf = decompress(tool, payload if tool == "gzip" else payload[:-4])
            break
    else:
        raise InvalidArgumentError(f"the kernel's payload starts with {payload[:6].hex()}, no known compression")
    (size,) = struct.unpack("<I", payload[-4:])
    if len(elf) != size or elf[:4] != b"\x7fELF":
        raise InvalidArgumentError(f"the kernel unpacked to {len(elf)} bytes, not to an ELF file of {size}")
    if _PVH_NOTE not in elf and _PVH_NOTE_64 not in elf:
        raise InvalidArgumentError("the kernel has no PVH entry point (CONFIG_PVH): no microVM monitor can start it")
    return elf


class Modules:
    """The modules of one kernel package, by name."""

    def __init__(self, folder: Path) -> None:
        self.release = folder.name
        self._files = {}
        for path in sorted(folder.rglob("*.ko*")):
            self._files[_canonical(path.name.split(".ko", 1)[0])] = path
        builtin = folder / "modules.builtin"
        self._builtin = (
            {_canonical(Path(line).name.split(".ko", 1)[0]) for line in builtin.read_text().splitlines()}
            if builtin.is_file()
            else set()
        )

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return `names` and what they depend on, dependencies first; what the kernel has built in is left out."""
        order: list[str] = []
        for name in names:
            self._visit(_canonical(name), order)
        return order

    def image(self, name: str) -> bytes:
        """Return the module's ELF file without its signature: checking one takes emulated CPUs milliseconds, and the
        initrd that holds the modules comes from the host like the kernel itself."""
        return strip_signature(self._read(_canonical(name)))

    def _visit(self, name: str, order: list[str]) -> None:
        if name in order or name in self._builtin:
            return
        for needed in depends(self._read(name)):
            self._visit(_canonical(needed), order)
        order.append(name)

    def _read(self, name: str) -> bytes:
        path = self._files.get(name)
        if path is None:
            raise FailedPreconditionError(
                f"kernel {self.release} has no module {name} and does not have it built in",
                fix="use the distribution's kernel for virtual machines (linux-image-cloud-amd64, linux-image-virtual)",
            )
        data = path.read_bytes()
        tool = {".zst": "zstd", ".xz": "xz", ".gz": "gzip"}.get(path.suffix)
        return decompress(tool, data) if tool else data


def depends(module: bytes) -> list[str]:
    """Return the names in a module's `depends=` information (modinfo(8))."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in match.group(1).decode().split(",") if name] if match else []


def strip_signature(module: bytes) -> bytes:
    """Return the module without the signature appended to it (struct module_signature, linux/module_signature.h)."""
    if not module.endswith(_SIGNATURE):
        return module
    end = len(module) - len(_SIGNATURE)
    (signature_bytes,) = struct.unpack_from(">I", module, end - 4)
    return module[: end - 12 - signature_bytes]


def _canonical(name: str) -> str:
    return name.replace("-", "_")
