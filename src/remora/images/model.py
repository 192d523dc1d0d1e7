"""What an image is to the rest of Remora: a name, a digest, layers to attach, and how to start its process."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remora.errors import InvalidArgumentError

#: docker/distribution's reference grammar, without the digest part: images are stored under names.
_NAME = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?/)?[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r":[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class ImageConfig:
    """How an image wants its process started (OCI image-spec, config.md). `env` keeps the image's order."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = "SIGTERM"

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return the JSON form, the one of image records and of `remora image show --json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageConfig:
        """Read the form that `to_dict` gives."""
        lists = {key: tuple(values[key]) for key in ("entrypoint", "cmd", "exposed_ports")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class Image:
    """An image of the store. `layers` are EROFS files, the lowest first; hold the image while you use them."""

    name: str
    digest: str
    layers: tuple[Path, ...]
    config: ImageConfig
    architecture: str = "amd64"
    created: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers together, shared ones included."""
        return sum(layer.stat().st_size for layer in self.layers)

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """The digests that name the layers, the lowest first."""
        return tuple(f"sha256:{layer.stem}" for layer in self.layers)


def full_name(name: str) -> str:
    """Return `name` with its tag; `latest` unless given. Raises `InvalidArgumentError` for what is no image name."""
    full = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    if not _NAME.fullmatch(full) or len(full) > 200:
        raise InvalidArgumentError(
            f"{name!r} is no image name", fix="use lower-case letters, digits and . _ - /, then :TAG if you want one"
        )
    return full


def check_digest(value: object, where: str) -> str:
    """Return `value` if it is a SHA-256 digest as OCI writes it."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise InvalidArgumentError(
            f"{where}: {str(value)[:90]!r} is no digest; expected sha256: and 64 hexadecimal digits"
        )
    return value


def machine_architecture() -> str:
    """Return this machine's architecture as OCI names it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)
