"""What somebody asks for when they run a microVM, checked and in one value; and the parsers of its textual forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from remora import paths
from remora.errors import InvalidArgumentError
from remora.sandboxes.jailing import JailRequest
from remora.sandboxes.launch import AttachSpec, MountSpec

DEFAULT_MEMORY_MIB = 256
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SIZE = re.compile(r"(\d{1,18})\s*([kmgtKMGT]?)(?:i?[bB])?", re.ASCII)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Mount(NamedTuple):
    """A file system to add to the container: `tmpfs`, `image` (an erofs file) or `bind` (a directory, packed)."""

    type: str
    source: Path | None
    destination: str
    readonly: bool


class Options(NamedTuple):
    """A microVM to run. Empty values mean the image's own, or the default."""

    image: str = ""
    command: tuple[str, ...] = ()
    #: Replaces the image's entry point; None leaves it.
    entrypoint: tuple[str, ...] | None = None
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    user: str = ""
    cpus: int = 1
    memory_mib: int = DEFAULT_MEMORY_MIB
    #: Name of the virtual machine monitor (vmm/drivers.py).
    vmm: str = "qemu"
    #: How its process is locked in; None: it is not.
    jail: JailRequest | None = None
    mounts: tuple[Mount, ...] = ()
    readonly_root: bool = False
    name: str = ""
    hostname: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    tenant: str = ""
    #: False: no way to the node agent.
    accelerator: bool = True
    #: (rows, columns) of the process's terminal; None: it has none.
    terminal: tuple[int, int] | None = None
    #: False: the process reads end of file at once.
    stdin: bool = True
    detached: bool = False
    boot_timeout_s: float = 60.0


def parse_size_mib(text: str) -> int:
    """Read `256M`, `1G`, `512MiB`; a number alone is bytes, as elsewhere. Returns MiB, rounded up."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(f"'{text[:40]}' is no memory size", fix="write it like 256M or 1G")
    size = int(match[1]) * _UNITS[match[2].lower()]
    return -(-size // (1 << 20))


def parse_duration_s(text: str) -> float:
    """Read `10s`, `1.5m`, `2h`, `500ms`, or seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise InvalidArgumentError(f"'{text}' is no duration", fix="write it like 10s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_pair(text: str, what: str) -> tuple[str, str]:
    """Read `key=value`."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InvalidArgumentError(f"'{text}' is no {what}", fix=f"write a {what} as KEY=VALUE")
    return key, value


def parse_env(text: str, environ: dict[str, str]) -> tuple[str, str] | None:
    """Read `KEY=VALUE`, or `KEY` for the caller's own value (None where the caller has none, as docker does)."""
    if "=" in text or not text:
        return parse_pair(text, "variable")
    return (text, environ[text]) if text in environ else None


def parse_env_file(path: Path, environ: dict[str, str]) -> list[tuple[str, str]]:
    """Read a file with one variable per line; empty lines and those that begin with # count for nothing."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"the environment file {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            fix="name a text file with one KEY=VALUE per line",
        ) from error
    pairs = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and (pair := parse_env(stripped, environ)):
            pairs.append(pair)
    return pairs


def parse_mount(text: str) -> Mount:
    """Read `type=tmpfs,dst=/x`, `type=image,src=FILE,dst=/x,ro` or `type=bind,src=DIRECTORY,dst=/x,ro`."""
    fields: dict[str, str] = {}
    readonly = False
    aliases = {"source": "src", "destination": "dst", "target": "dst"}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if part in ("ro", "readonly"):
            readonly = True
        elif separator and aliases.get(key, key) in ("type", "src", "dst"):
            fields[aliases.get(key, key)] = value
        elif part not in ("rw",):
            raise InvalidArgumentError(f"the mount option '{part}' is unknown", fix="use type=, src=, dst= and ro")
    kind, destination = fields.get("type", "bind"), fields.get("dst", "")
    if not destination.startswith("/") or ".." in destination.split("/"):
        raise InvalidArgumentError(
            f"a mount needs an absolute destination, not '{destination}'", fix="write dst=/path/in/the/container"
        )
    if kind == "tmpfs":
        return Mount("tmpfs", None, destination, readonly)
    if kind not in ("image", "bind"):
        raise InvalidArgumentError(f"the mount type '{kind}' is unknown", fix="use tmpfs, image or bind")
    if "src" not in fields:
        raise InvalidArgumentError(f"a mount of type {kind} needs a source", fix="write src=PATH")
    if not readonly:
        raise InvalidArgumentError(
            f"a writable {kind} mount of {fields['src']} was asked for, and a microVM shares no writable files with "
            "its host",
            fix="add `ro`, use type=tmpfs for scratch space, and take results from stdout",
        )
    source = Path(fields["src"]).absolute()
    if kind == "bind" and not source.is_dir():
        raise InvalidArgumentError(
            f"the directory {source} does not exist", fix="name a directory of this host in src="
        )
    if kind == "image" and not source.is_file():
        raise InvalidArgumentError(f"the file {source} does not exist", fix="name an erofs image in src=")
    return Mount(kind, source, destination, True)


def guest_mount(mount: Mount, serial: str) -> MountSpec:
    """Return how the guest is told about a mount whose disk has this serial."""
    if mount.type == "tmpfs":
        return MountSpec("tmpfs", "", mount.destination, mount.readonly)
    return MountSpec("disk", serial, mount.destination, True)


def attachment(options: Options, *, parent: str = "", template: bool = False) -> AttachSpec | None:
    """Return how the sandbox is to be attached to this host's agent; None if no accelerator was asked for."""
    if not options.accelerator:
        return None
    return AttachSpec(paths.control_socket(), options.tenant, options.labels, parent, template)
