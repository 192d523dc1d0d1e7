"""From encoded pictures to tensors: every format and mode, orientation, limits, and clear refusals."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remora.backends.contract import Limits
from remora.backends.vision import pictures
from remora.backends.vision.classification import rank
from remora.backends.vision.pictures import prepare
from remora.backends.vision.preprocess import Preprocess
from remora.errors import InternalError, InvalidArgumentError

PLAIN = Preprocess(width=8, height=8, crop="none", dtype="uint8", layout="nhwc")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return a picture that is red on the left and blue on the right."""
    image = Image.new("RGB", size, (200, 0, 0))
    image.paste((0, 0, 200), (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    pixels = prepare(encode(halves(), kind), PLAIN)[0]
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[4, 0].astype(int) - (200, 0, 0)).max() <= 12
    assert np.abs(pixels[4, 7].astype(int) - (0, 0, 200)).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 65535, np.uint16))
    else:
        image = Image.new("RGB", (16, 16), "white").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    data = encode(image, "JPEG") if kind == "TIFF" else encode(image)
    assert prepare(data, PLAIN)[0].min() >= 250


def test_transparency_is_shown_on_white() -> None:
    assert prepare(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 0))), PLAIN).min() == 255


@pytest.mark.parametrize("without_simplejpeg", [False, True])
@pytest.mark.parametrize(("orientation", "red"), [(1, (4, 0)), (3, (4, 7)), (6, (0, 4)), (8, (7, 4)), (2, (4, 7))])
def test_the_orientation_of_a_photograph_is_applied(
    orientation: int, red: tuple[int, int], without_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_simplejpeg:
        monkeypatch.setattr(pictures, "simplejpeg", None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = prepare(encode(halves(), "JPEG", quality=95, exif=exif), PLAIN)[0]
    assert pixels[red][0] > 150
    assert pixels[red][2] < 60


def test_a_scaled_decode_agrees_with_a_full_one() -> None:
    noise = np.random.default_rng(5).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG", quality=92)
    how = Preprocess(width=224, height=224, dtype="uint8", layout="nhwc")
    scaled = prepare(data, how)[0].astype(int)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    exact = np.asarray(pictures._crop_and_resize(full, how, full.size)[0]).astype(int)
    assert np.abs(scaled - exact).mean() < 1.5


def test_preprocessing_is_what_the_manifest_says() -> None:
    how = Preprocess.from_manifest({"width": 4, "height": 4, "mean": [127.0] * 3, "std": [128.0] * 3, "crop": "none"})
    tensor = prepare(encode(Image.new("RGB", (4, 4), (127, 255, 0))), how)
    assert tensor.dtype == np.float32
    assert tensor.shape == (1, 3, 4, 4)
    assert tensor[0, :, 0, 0].tolist() == [0.0, 1.0, -127 / 128]


def test_the_centre_crop_keeps_the_shorter_side_less_the_padding() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    how = Preprocess(width=96, height=96, crop_padding=4, dtype="uint8", layout="nhwc")
    assert prepare(encode(image), how).min() >= 254


def test_blue_first_and_channels_last() -> None:
    how = Preprocess(width=2, height=2, crop="none", dtype="uint8", layout="nhwc", channels="bgr")
    assert prepare(encode(Image.new("RGB", (2, 2), (1, 2, 3))), how)[0, 0, 0].tolist() == [3, 2, 1]


@pytest.mark.parametrize("data", [b"", b"hello, I am text", bytes(1000), b"%PDF-1.4 ...", b"<svg></svg>"])
def test_bytes_that_are_no_picture_are_refused_with_the_fix(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="not a picture") as caught:
        prepare(data, PLAIN)
    assert "JPEG" in (caught.value.fix or "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(InvalidArgumentError, match="picture"):
        prepare(data[: len(data) // 3], PLAIN)


def test_a_decompression_bomb_is_refused_before_a_pixel_exists() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = b""
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    with pytest.raises(InvalidArgumentError, match="scale it down"):
        prepare(b"\x89PNG\r\n\x1a\n" + chunks, PLAIN)


def test_a_picture_over_the_pixel_limit_says_the_limit() -> None:
    with pytest.raises(InvalidArgumentError, match="64x64; at most 100 pixels"):
        prepare(encode(halves()), PLAIN, Limits(pixels=100))


def test_a_file_over_the_size_limit_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="10 are allowed"):
        prepare(encode(halves()), PLAIN, Limits(image_bytes=10))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"width": 8}, "needs width and height"),
        ({"width": 0, "height": 8}, "width is 0"),
        ({"width": 8, "height": 8, "resize": "magic"}, "resize is 'magic'"),
        ({"width": 8, "height": 8, "std": [1, 0, 1]}, "std must not be 0"),
        ({"width": 8, "height": 8, "mean": [1, 2]}, "three numbers"),
        ({"width": 8, "height": 8, "mean": 3}, "three numbers"),
        ({"width": 8, "height": 8, "colour": "rgb"}, "unknown keys: colour"),
    ],
)
def test_a_wrong_preprocess_table_names_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Preprocess.from_manifest(table)


def test_ranking_is_best_first_and_sums_to_one() -> None:
    ranking = rank(np.asarray([[1.0, 3.0, 2.0]], np.float32), 3)
    assert [index for index, _score in ranking] == [1, 2, 0]
    assert sum(score for _index, score in ranking) == pytest.approx(1.0)
    assert rank(np.asarray([0.1, 0.7]), 1, "none") == [(1, 0.7)]


def test_scores_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(InternalError):
        rank(np.asarray([np.nan, 1.0]), 1)
