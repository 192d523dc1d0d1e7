"""What a node without Python, QEMU or a guest OS gets from the agent's image: the shim's own environment.

The image holds it as ordinary Debian files; its list is `/usr/share/remora/bundle.json`. On the node they lie below
`/opt/remora/<id>`, whole or not at all, and are reached through small programs that name their own dynamic linker and
libraries: the node's C library is never asked. Versions lie side by side, since the shims of running pods go on with
theirs.
"""

from __future__ import annotations

import json
import posixpath
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.errors import DataLossError, UnavailableError
from remora.kube.node_files import Change, File, Node
from remora.sandboxes.guest_files import GuestFiles, fingerprint_of, note_text

LIST = "/usr/share/remora/bundle.json"
PREFIX = "/opt/remora"
STATE = "/var/lib/remora"
_COMPLETE = ".complete"


@dataclass(frozen=True)
class Bundle:
    """Paths as in the image, which the node gets below `home`."""

    id: str
    #: Directories and files to copy.
    trees: Sequence[str]
    #: Name -> path of what the shim runs; `python3` is among them.
    programs: Mapping[str, str]
    linker: str
    libraries: Sequence[str]
    #: The directory that holds the package `remora`.
    source: str
    #: The directory of the guest OS image, and its digest.
    guest: str
    guest_digest: str

    @property
    def home(self) -> str:
        return f"{PREFIX}/{self.id}"

    def program(self, name: str) -> str:
        """Return the path on the node of a program that can be run."""
        return f"{self.home}/bin/{name}"

    def binary(self, name: str) -> str:
        """Return where the program itself is, below `home`: beside `bin`, as the image has some there, too."""
        return f"libexec/{posixpath.basename(self.programs[name])}"

    def at_home(self, path: str) -> str:
        return self.home + path


def load(path: Path = Path(LIST)) -> Bundle | None:
    """Return the bundle of the image that this process runs in, None outside of one.

    Raises:
        DataLossError: the image is damaged.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return Bundle(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataLossError(f"{path} cannot be read: {error}", fix="build the image again: make image") from error


def wrapper(bundle: Bundle, name: str) -> str:
    """Return the program `name` of the node: a script for /bin/sh, which each node has."""
    libraries = ":".join(map(bundle.at_home, bundle.libraries))
    command = f'{bundle.at_home(bundle.linker)} --library-path {libraries} --argv0 "$0" '
    command += f"{bundle.home}/{bundle.binary(name)}"
    if name.startswith("qemu-"):
        # It looks for its firmware beside its own binary, for which it takes the linker.
        command = f"QEMU_MODULE_DIR={bundle.at_home(posixpath.join(bundle.libraries[-1], 'qemu'))} exec {command}"
        return f'#!/bin/sh\n{command} -L {bundle.at_home("/usr/share/qemu")} "$@"\n'
    return f'#!/bin/sh\nexec {command} "$@"\n'


def shim(bundle: Bundle) -> str:
    """Return `containerd-shim-remora-v2`: as `shim.launcher`'s, for a Python that is started through a wrapper."""
    start = f"import sys; sys.path.insert(0, '{bundle.at_home(bundle.source)}'); "
    start += "from remora.shim.start import main; sys.exit(main(sys.argv))"
    return (
        f'#!/bin/sh\nPATH={bundle.home}/bin:$PATH\nexport PATH\nexec {bundle.program("python3")} -ISc "{start}" "$@"\n'
    )


def install(node: Node, bundle: Bundle, root: Path = Path("/")) -> None:
    """Copy the bundle and the guest OS image of `root` to the node, unless they are there.

    Raises:
        UnavailableError: the node's disk is full or cannot be written.
    """
    python = bundle.programs["python3"]
    standard = posixpath.join("/usr/lib", posixpath.basename(python))
    trees = {path: path.lstrip("/") for path in (*bundle.trees, bundle.linker)}
    trees |= {path: bundle.binary(name) for name, path in bundle.programs.items()}
    programs = {f"bin/{name}": wrapper(bundle, name) for name in bundle.programs}
    # Python finds its library by the way from its own name: bin/python3, lib/python3.11.
    links = {f"lib/{posixpath.basename(python)}": f"..{standard}"}
    guest = f"{STATE}/guest/{bundle.guest_digest[:16]}"
    for home, sources, files, made in (
        (bundle.home, trees, programs, links),
        (guest, {bundle.guest: ""}, {}, {}),
    ):
        if (node.at(home) / _COMPLETE).exists():
            node.changes.append(Change("keep", home, "as it should be"))
            continue
        node.changes.append(Change("write", home, "new"))
        if not node.dry_run:
            try:
                _copy(node.at(home), root, sources, files, made)
            except (OSError, shutil.Error) as error:
                raise UnavailableError(
                    f"{home} cannot be written on the node: {error}", fix="free some space"
                ) from error


def trees(bundle: Bundle) -> list[str]:
    """Return the directories that `install` makes."""
    return [bundle.home, f"{STATE}/guest/{bundle.guest_digest[:16]}"]


def guest_note(bundle: Bundle, root: Path = Path("/")) -> File:
    """Return the file by which the shim finds its guest OS."""
    guest = Path(STATE) / "guest" / bundle.guest_digest[:16]
    files = GuestFiles(guest / "vmlinux", guest / "initrd", guest / "disk.erofs")
    package = root / bundle.source.lstrip("/") / "remora"
    return File(f"{STATE}/guest/current.json", note_text(files, fingerprint_of(package)).encode())


def _copy(
    home: Path, root: Path, sources: Mapping[str, str], files: Mapping[str, str], links: Mapping[str, str]
) -> None:
    draft = home.with_name(f".{home.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for path, target in sources.items():
            source = root / path.lstrip("/")
            if source.is_dir():
                shutil.copytree(source, draft / target, symlinks=True, dirs_exist_ok=True)
            elif not (draft / target).exists():
                (draft / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, draft / target)
        for name, text in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text)
            (draft / name).chmod(0o755)
        for name, target in links.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            if not (draft / name).exists():
                (draft / name).symlink_to(target)
        (draft / _COMPLETE).write_bytes(b"")
        shutil.rmtree(home, ignore_errors=True)  # of an installation that was cut off
        draft.rename(home)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
