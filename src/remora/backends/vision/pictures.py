"""An encoded picture becomes the tensor that a manifest describes, and places in it become places in the picture.

Decoding costs more than a small classifier: 33 ms for a 500 KB JPEG with a full decode, 5.6 ms when the decoder scales
in the frequency domain. The scale comes from the header, so that it never falls below what the crop needs. Size limits
are checked on the header, before any pixel exists, because a few bytes can name a picture of gigabytes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, WebPImagePlugin

from remora.backends.contract import Array, Limits
from remora.backends.vision.preprocess import Preprocess
from remora.errors import InvalidArgumentError

try:
    import simplejpeg
except ImportError:  # optional: Pillow's draft mode is the slower way
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Their decoders, and no others: Pillow's `init` would import forty, in 40 ms.
Image.preinit()
_DECODERS = (WebPImagePlugin,)
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
class Window:
    """The part of a picture that an input shows, in pixels of the upright picture at full size.

    It reaches beyond the picture where the input is padded.
    """

    width: int  # of the picture
    height: int
    left: float
    upper: float
    right: float
    lower: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where in the picture a place of the input lies, given as shares (0..1) of its sides.

        What lies outside the picture comes to its edge.
        """
        across = self.left + x * (self.right - self.left)
        down = self.upper + y * (self.lower - self.upper)
        return min(max(across, 0.0), float(self.width)), min(max(down, 0.0), float(self.height))


def prepare(encoded: bytes | memoryview, how: Preprocess, limits: Limits | None = None) -> Array:
    """Decode a picture and return the model's input, [1, 3, H, W] or [1, H, W, 3].

    Raises:
        InvalidArgumentError: it is no picture, is damaged, or is larger than `limits` allow.
    """
    return prepare_window(encoded, how, limits)[0]


def prepare_window(encoded: bytes | memoryview, how: Preprocess, limits: Limits | None = None) -> tuple[Array, Window]:
    """Do as `prepare`, and also return which part of the picture the input shows."""
    limits = limits or Limits()
    if len(encoded) > limits.image_bytes:
        raise InvalidArgumentError(f"the picture has {len(encoded)} bytes, {limits.image_bytes} are allowed")
    image, size = _decode(encoded, how, limits)
    shown, window = _crop_and_resize(image, how, size)
    return _to_tensor(shown, how), window


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


def _crop_and_resize(image: Image.Image, how: Preprocess, size: tuple[int, int]) -> tuple[Image.Image, Window]:
    """Crop by the whole pixels of the full-size picture, whatever size it was decoded at, and resize."""
    width, height = size
    if how.crop == "pad":
        return _pad(image, how, size)
    left, upper, right, lower = 0, 0, width, height
    if how.crop == "center":
        side = max(1, int(how.crop_share() * min(width, height)))
        left, upper = (width - side) // 2, (height - side) // 2
        right, lower = left + side, upper + side
    across, down = image.width / width, image.height / height
    box = (left * across, upper * down, right * across, lower * down)
    shown = image.resize((how.width, how.height), _RESIZES[how.resize], box=box)
    return shown, Window(width, height, left, upper, right, lower)


def _pad(image: Image.Image, how: Preprocess, size: tuple[int, int]) -> tuple[Image.Image, Window]:
    """Fit the whole picture into the input, in its middle, with black beside or above and below it."""
    width, height = size
    scale = min(how.width / width, how.height / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, upper = (how.width - inner[0]) // 2, (how.height - inner[1]) // 2
    shown = Image.new("RGB", (how.width, how.height))
    shown.paste(image.resize(inner, _RESIZES[how.resize]), (left, upper))
    across, down = width / inner[0], height / inner[1]
    window = Window(
        width, height, -left * across, -upper * down, (how.width - left) * across, (how.height - upper) * down
    )
    return shown, window


def _to_tensor(image: Image.Image, how: Preprocess) -> Array:
    pixels: Array = np.asarray(image)
    if how.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    if how.dtype != "float32":
        ordered = pixels.transpose(2, 0, 1) if how.layout == "nchw" else pixels
        return np.ascontiguousarray(ordered, how.dtype)[np.newaxis]
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
