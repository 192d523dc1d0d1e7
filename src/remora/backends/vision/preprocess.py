"""How a picture becomes a model's input: the `[preprocess]` table of a manifest, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from remora.errors import InvalidArgumentError

RESIZES = ("bicubic", "bilinear", "lanczos", "nearest")


@dataclass(frozen=True)
class Preprocess:
    """The keys of the table, with their defaults."""

    width: int
    height: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of 0..255
    std: tuple[float, ...] = (255.0, 255.0, 255.0)
    #: `center`: the largest square, shrunk by size / (size + crop_padding); `none`: the whole picture, its sides
    #: stretched; `pad`: the whole picture, black around it.
    crop: str = "center"
    crop_padding: int = 32
    resize: str = "bicubic"
    layout: str = "nchw"
    dtype: str = "float32"
    channels: str = "rgb"

    @classmethod
    def from_manifest(cls, table: Mapping[str, Any]) -> Self:
        """Validate a `[preprocess]` table.

        Raises:
            InvalidArgumentError: names the key that is wrong.
        """
        unknown = set(table) - set(cls.__dataclass_fields__)
        if unknown:
            raise InvalidArgumentError(
                f"[preprocess] has unknown keys: {', '.join(sorted(unknown))}",
                fix=f"allowed are {', '.join(cls.__dataclass_fields__)}",
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        try:
            made = cls(**values)
        except TypeError as error:
            raise InvalidArgumentError("[preprocess] needs width and height") from error
        made._validate()
        return made

    def _validate(self) -> None:
        choices: tuple[tuple[str, object, tuple[str, ...]], ...] = (
            ("crop", self.crop, ("center", "none", "pad")),
            ("resize", self.resize, RESIZES),
            ("layout", self.layout, ("nchw", "nhwc")),
            ("dtype", self.dtype, ("float32", "uint8", "int32")),
            ("channels", self.channels, ("rgb", "bgr")),
        )
        for key, given, allowed in choices:
            if given not in allowed:
                raise InvalidArgumentError(f"[preprocess] {key} is {given!r}", fix=f"allowed are {', '.join(allowed)}")
        for key, size in (("width", self.width), ("height", self.height)):
            if not isinstance(size, int) or not 1 <= size <= 4096:
                raise InvalidArgumentError(f"[preprocess] {key} is {size!r}", fix="allowed are 1 to 4096")
        triples: tuple[tuple[str, object], ...] = (("mean", self.mean), ("std", self.std))
        for key, triple in triples:
            if (
                not isinstance(triple, tuple)
                or len(triple) != 3
                or not all(isinstance(part, int | float) for part in triple)
            ):
                raise InvalidArgumentError(f"[preprocess] {key} must be three numbers (of 0..255)")
        if not all(self.std):
            raise InvalidArgumentError("[preprocess] std must not be 0")
        if not isinstance(self.crop_padding, int) or self.crop_padding < 0:
            raise InvalidArgumentError("[preprocess] crop_padding must be 0 or more pixels")

    def crop_share(self) -> float:
        """Return which part of the shorter side the crop keeps."""
        if self.crop != "center":
            return 1.0
        size = max(self.width, self.height)
        return size / (size + self.crop_padding)
