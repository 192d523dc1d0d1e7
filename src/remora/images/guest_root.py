"""Chooses and lays out the files of the guest OS disk.

The disk is small because nothing is on it that does not run: the Python modules are those that PID 1 really imports
(asked of the guest's own interpreter), and the libraries those that its ELF files name. Python files are stored as
bytecode without sources, which saves the guest the search and the check of both.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

from remora.errors import FailedPreconditionError

#: Imported by PID 1 only when something fails or is asked for, so the import trace does not show them.
_LATE_MODULES = (
    "traceback",
    "encodings.idna",
    "encodings.latin_1",
    "stringprep",
    "unicodedata",
    "codecs",
    "remora.guest.portforward",
    "remora.guest.channel",
    "remora.guest.vsock",
)
_LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib")
_MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "etc", "root", "var")
#: What the SDK consists of inside a container, below /run/remora/sdk.
SDK_PARTS = ("__init__.py", "aio.py", "errors.py", "reactor.py", "wire", "client", "vaccel")
#: Runs in the guest's interpreter: prints the file of every module that PID 1 has imported, then of the late ones.
_TRACE = """
import sys
sys.path[:0] = sys.argv[1:3]
import remora.guest.main
for name in sys.argv[3:]:
    try:
        __import__(name)
    except ImportError:
        pass
for name, module in sorted(sys.modules.items()):
    path = getattr(module, "__file__", None)
    if path:
        print(path)
"""
#: Runs in the guest's interpreter: compiles `source target shown-name` lines. The hash is never checked in the guest.
_COMPILE = """
import py_compile, sys
for line in sys.stdin.read().splitlines():
    source, target, shown = line.split("\\t")
    py_compile.compile(source, target, shown, doraise=True, optimize=0,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


class GuestPython:
    """The guest's interpreter, run on the host through the guest's own loader and libraries."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        found = sorted(path for path in (tree / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
        if not found:
            raise FailedPreconditionError("the unpacked packages hold no python3.* interpreter")
        self.binary = found[-1]
        self.library = tree / "usr/lib" / self.binary.name
        self.tag = "cpython-3" + self.binary.name[8:]

    def run(self, code: str, *arguments: str, stdin: str = "") -> str:
        folders = ":".join(str(self.tree / folder) for folder in _LIBRARY_FOLDERS)
        loader = next(path for folder in _LIBRARY_FOLDERS for path in (self.tree / folder).glob("ld-linux-x86-64.so.2"))
        environment = {
            "PYTHONHOME": str(self.tree / "usr"),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
        }
        argv = [str(loader), "--library-path", folders, str(self.binary), "-S", "-s", "-c", code, *arguments]
        done = subprocess.run(argv, input=stdin, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise FailedPreconditionError(
                f"the guest's {self.binary.name} failed while the image was built:\n{done.stderr.strip()}"
            )
        return done.stdout


def needed_libraries(elf: bytes) -> list[str]:
    """Return the DT_NEEDED names of a 64-bit little-endian ELF file (elf(5)); none for a static one."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return []
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    segments = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    names: list[int] = []
    strings = 0
    for kind, _flags, offset, _vaddr, _paddr, length in segments:
        if kind == 2:  # PT_DYNAMIC
            for position in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", elf, position)
                if tag == 1:
                    names.append(value)
                elif tag == 5:
                    strings = value
    for kind, _flags, offset, vaddr, _paddr, length in segments:
        if kind == 1 and vaddr <= strings < vaddr + length:  # PT_LOAD that holds the string table
            base = strings - vaddr + offset
            return [elf[base + name : elf.index(b"\0", base + name)].decode() for name in names]
    return []


def build_root(tree: Path, package: Path, root: Path) -> None:
    """Lay out the OS disk in `root`: from the unpacked packages in `tree` and Remora's own `package` folder."""
    python = GuestPython(tree)
    for name in _MOUNT_POINTS:
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
    _copy(python.binary, root / "usr/bin" / python.binary.name)
    (root / "usr/bin/python3").symlink_to(python.binary.name)
    _copy(tree / "usr/bin/crun", root / "usr/bin/crun")
    _copy(tree / "usr/bin/busybox", root / "usr/bin/busybox")
    compiled = _copy_modules(python, package, root)
    compiled += _copy_sdk(python, package, root)
    python.run(_COMPILE, stdin="\n".join("\t".join(map(str, line)) for line in sorted(compiled)))
    _copy_libraries(tree, root)
    _write_etc(root)


def _copy_modules(python: GuestPython, package: Path, root: Path) -> list[tuple[Path, Path, Path]]:
    compiled = []
    lean = package / "guest/lean"
    for line in python.run(_TRACE, str(lean), str(package.parent), *_LATE_MODULES).splitlines():
        path = Path(line)
        home = next(home for home in (lean, python.library, package.parent) if path.is_relative_to(home))
        inside = path.relative_to(home)
        shown = Path("/usr/lib") / python.binary.name / inside
        target = root / shown.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            compiled.append((path, target.with_suffix(".pyc"), shown))
        else:
            _copy(path, target)
    return compiled


def _copy_sdk(python: GuestPython, package: Path, root: Path) -> list[tuple[Path, Path, Path]]:
    """The SDK runs in the image's own Python of any version: sources, and bytecode for the distribution's Python."""
    compiled = []
    sdk = root / "usr/share/remora/sdk/remora"
    for part in SDK_PARTS:
        source = package / part
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            inside = path.relative_to(package)
            target = sdk / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            bytecode = target.parent / "__pycache__" / f"{target.stem}.{python.tag}.pyc"
            compiled.append((path, bytecode, Path("/run/remora/sdk/remora") / inside))
    return compiled


def _copy_libraries(tree: Path, root: Path) -> None:
    waiting = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    done: set[str] = set()
    while waiting:
        for name in needed_libraries(waiting.pop().read_bytes()):
            if name in done:
                continue
            done.add(name)
            for folder in _LIBRARY_FOLDERS:
                source = tree / folder / name
                if source.exists():
                    # The loader itself has a fixed path; everything else goes where it looks without a cache.
                    place = "usr/lib64" if name.startswith("ld-linux") else "usr/lib/x86_64-linux-gnu"
                    target = root / place / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _copy(source, target)
                    waiting.append(target)
                    break
            else:
                raise FailedPreconditionError(f"no package of the guest OS holds the library {name}")


def _write_etc(root: Path) -> None:
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/hostname").write_text("remora\n")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source.resolve(), target)
    os.chmod(target, 0o755 if os.access(source, os.X_OK) else 0o644)
