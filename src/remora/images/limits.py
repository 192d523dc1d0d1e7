"""Bounds on what a layer may unpack to: an image is input from strangers until every bound has been checked."""

from __future__ import annotations

from dataclasses import dataclass

from remora.errors import InvalidArgumentError, ResourceExhaustedError

_GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What one layer may contain. The defaults hold every ordinary image and stop bombs before the disk is full."""

    max_bytes: int = 64 * _GIB
    max_entries: int = 1_000_000
    #: Below `ratio_floor_bytes` any ratio is fine (an empty log of 100 MB packs 1000:1); above it gzip of real files
    #: reaches 20:1 at most.
    max_ratio: int = 200
    ratio_floor_bytes: int = _GIB
    max_path_bytes: int = 4096
    max_name_bytes: int = 255
    max_header_bytes: int = 1 << 20
    max_xattr_bytes: int = 64 << 10

    def check_unpacked(self, packed_bytes: int, unpacked_bytes: int) -> None:
        """Raise `ResourceExhaustedError` when a stream has unpacked to more than is allowed."""
        if unpacked_bytes > self.max_bytes:
            raise ResourceExhaustedError(
                f"the layer unpacks to more than {self.max_bytes} bytes, the limit for one layer"
            )
        if unpacked_bytes > max(self.ratio_floor_bytes, packed_bytes * self.max_ratio):
            raise ResourceExhaustedError(
                f"the layer unpacks to more than {self.max_ratio} times its {packed_bytes} bytes: it looks like a bomb"
            )

    def check_path(self, path: bytes) -> None:
        """Raise `InvalidArgumentError` for a path that no Linux file system could hold."""
        if len(path) > self.max_path_bytes:
            raise InvalidArgumentError(f"a path of {len(path)} bytes in the layer; {self.max_path_bytes} are allowed")
        if any(len(part) > self.max_name_bytes for part in path.split(b"/")):
            raise InvalidArgumentError(
                f"a file name of more than {self.max_name_bytes} bytes in the layer: {path[:80]!r}..."
            )


DEFAULT_LIMITS = Limits()
