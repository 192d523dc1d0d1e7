"""An encoded picture becomes the tensor that a manifest describes; a classifier's scores become a ranking.

Decoding costs more than a small classifier: 33 ms for a 500 KB JPEG with a full decode, 5.6 ms when the decoder scales
in the frequency domain. The scale comes from the header, so that it never falls below what the crop needs. Size limits
are checked on the header, before any pixel exists, because a few bytes can name a picture of gigabytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from remora.backends.contract import Array, Limits, LoadedModel, Stop
from remora.errors import InternalError, InvalidArgumentError

try:
    import simplejpeg
except ImportError:  # optional: Pillow's draft mode is the slower way
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
Image.init()  # registers the decoders now, as a confined worker may have no files to import from later
_FIX_IMAGE = f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
_RESIZES = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_ORIENTATION_TAG = 0x0112
_TURNED = 5  # from here on, width and height change places


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input tensor; the `[preprocess]` table of a manifest."""

    width: int
    height: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of 0..255
    std: tuple[float, ...] = (255.0, 255.0, 255.0)
    #: `center`: the largest square, shrunk by size / (size + crop_padding); `none`: the whole picture.
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
            ("crop", self.crop, ("center", "none")),
            ("resize", self.resize, tuple(_RESIZES)),
            ("layout", self.layout, ("nchw", "nhwc")),
            ("dtype", self.dtype, ("float32", "uint8")),
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
        if self.crop == "none":
            return 1.0
        size = max(self.width, self.height)
        return size / (size + self.crop_padding)


def prepare(encoded: bytes | memoryview, how: Preprocess, limits: Limits | None = None) -> Array:
    """Decode a picture and return the model's input, [1, 3, H, W] or [1, H, W, 3].

    Raises:
        InvalidArgumentError: it is no picture, is damaged, or is larger than `limits` allow.
    """
    limits = limits or Limits()
    if len(encoded) > limits.image_bytes:
        raise InvalidArgumentError(f"the picture has {len(encoded)} bytes, {limits.image_bytes} are allowed")
    image, size = _decode(encoded, how, limits)
    return _to_tensor(_crop_and_resize(image, how, size), how)


def _decode(encoded: bytes | memoryview, how: Preprocess, limits: Limits) -> tuple[Image.Image, tuple[int, int]]:
    """Return the picture upright in RGB, perhaps scaled down, and its full size."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        width, height = image.size
        if width * height > limits.pixels or not width or not height:
            raise InvalidArgumentError(
                f"the picture is {width}x{height}; at most {limits.pixels} pixels are allowed", fix="scale it down"
            )
        if image.format != "JPEG":
            upright = _to_rgb(ImageOps.exif_transpose(image))
            return upright, upright.size
        # Half as much again as the crop needs: the scaled decode then keeps the answers of a full one.
        need = math.ceil(1.5 * max(how.width, how.height) / how.crop_share())
        decoded = _decode_jpeg(encoded, image, need)
        if decoded is None:
            image.draft("RGB", (need, need))
            decoded = _to_rgb(ImageOps.exif_transpose(image))
        return decoded, (height, width) if _orientation(image) >= _TURNED else (width, height)
    except UnidentifiedImageError as error:
        raise InvalidArgumentError(f"these {len(encoded)} bytes are not a picture", fix=_FIX_IMAGE) from error
    except Image.DecompressionBombError as error:
        raise InvalidArgumentError(f"the picture is too large: {error}", fix="scale it down") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, TypeError, IndexError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise InvalidArgumentError(f"the picture is damaged: {error}", fix=_FIX_IMAGE) from error


def _decode_jpeg(encoded: bytes | memoryview, header: Image.Image, need: int) -> Image.Image | None:
    """Return the picture decoded at the smallest scale that keeps both sides above `need`; None to let Pillow try.

    Only halves, quarters and eighths: libjpeg-turbo has vector code for these, the scales between are slower than none.
    """
    if simplejpeg is None or header.mode not in ("RGB", "L"):
        return None  # CMYK and YCCK are Pillow's
    divisor = 1
    while divisor < 8 and min(header.size) >= 2 * divisor * need:
        divisor *= 2
    width, height = (-(-side // divisor) for side in header.size)
    try:
        pixels = simplejpeg.decode_jpeg(encoded, "RGB", fastdct=True, min_height=height, min_width=width)
    except ValueError:
        return None  # Pillow accepts some truncated files, and words the error for the others
    image = Image.fromarray(pixels)
    orientation = _orientation(header)
    if orientation == 1:
        return image
    image.getexif()[_ORIENTATION_TAG] = orientation
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode; what is transparent is shown on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I;16", "I")) or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if levels.max(initial=0) > 255 else 255.0
        return Image.fromarray((levels.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _crop_and_resize(image: Image.Image, how: Preprocess, size: tuple[int, int]) -> Image.Image:
    """Crop by the whole pixels of the full-size picture, whatever size it was decoded at, and resize."""
    width, height = size
    left, upper, right, lower = 0, 0, width, height
    if how.crop == "center":
        side = max(1, int(how.crop_share() * min(width, height)))
        left, upper = (width - side) // 2, (height - side) // 2
        right, lower = left + side, upper + side
    across, down = image.width / width, image.height / height
    box = (left * across, upper * down, right * across, lower * down)
    return image.resize((how.width, how.height), _RESIZES[how.resize], box=box)


def _to_tensor(image: Image.Image, how: Preprocess) -> Array:
    pixels: Array = np.asarray(image)
    if how.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    if how.dtype == "uint8":
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if how.layout == "nchw" else pixels)[np.newaxis]
    values = _values(how.mean, how.std)
    planes = np.empty((3, how.height, how.width), np.float32)
    for channel in range(3):
        np.take(values[channel], pixels[:, :, channel], out=planes[channel], mode="clip")
    return (planes if how.layout == "nchw" else np.ascontiguousarray(planes.transpose(1, 2, 0)))[np.newaxis]


@lru_cache(maxsize=64)
def _values(mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Return what each of the 256 levels becomes, per channel: five times quicker than computing it per pixel."""
    levels = np.arange(256, dtype=np.float32)
    centred = levels - np.asarray(mean, np.float32)[:, np.newaxis]
    return np.asarray(centred / np.asarray(std, np.float32)[:, np.newaxis])


def rank(scores: Array, top: int, activation: str = "softmax") -> list[tuple[int, float]]:
    """Return (class, probability) of the `top` best classes, best first."""
    flat = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not np.isfinite(flat).all():
        raise InternalError("the model answered with scores that are not numbers")
    if activation == "softmax":
        powers = np.exp(flat - flat.max())
        flat = powers / powers.sum()
    order = np.argsort(-flat, kind="stable")[: max(1, top)]
    return [(int(index), float(flat[index])) for index in order]


@dataclass(frozen=True)
class Classifier:
    """A loaded model with the preprocessing and the score output that its manifest names."""

    model: LoadedModel
    preprocess: Preprocess
    input: str
    output: str
    activation: str = "softmax"

    @classmethod
    def from_manifest(cls, model: LoadedModel, manifest: Mapping[str, Any]) -> Self:
        """Match a manifest with the model it describes.

        Raises:
            InvalidArgumentError: the model cannot classify, or the manifest names what it does not have.
        """
        table = manifest.get("preprocess")
        if not isinstance(table, Mapping):
            raise InvalidArgumentError(
                "this model has no [preprocess] table in its manifest, so it cannot classify pictures",
                fix="send tensors with infer, or add the table",
            )
        how = Preprocess.from_manifest(table)
        scores = manifest.get("scores", {})
        source = _named(model.inputs, scores.get("input"), "input")
        target = _named(model.outputs, scores.get("output"), "output")
        activation = scores.get("activation", "softmax")
        if activation not in ("softmax", "none"):
            raise InvalidArgumentError(f"[scores] activation is {activation!r}", fix="allowed are softmax, none")
        return cls(model, how, source, target, activation)

    def classify(self, encoded: bytes | memoryview, top: int, stop: Stop, limits: Limits) -> list[tuple[int, float]]:
        feeds = {self.input: prepare(encoded, self.preprocess, limits)}
        wanted = self.model.check(feeds, (self.output,))
        return rank(self.model.run(feeds, wanted, stop)[0], top, self.activation)


def _named(specs: Sequence[Any], name: str | None, what: str) -> str:
    names = [spec.name for spec in specs]
    if name is None and names:
        return str(names[0])
    if name is None or name not in names:
        raise InvalidArgumentError(f"[scores] {what} is {name!r}", fix=f"the model has {', '.join(names)}")
    return name
