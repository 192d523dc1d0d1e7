"""Every opcode of Genop with its argument layout, and what each wrong layout is answered with."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remora.catalog.photos import fetch_photos
from vaccel_google import GoogleClient, RemoteError

RAW, INT32, INT64, UINT8, FLOAT32, FLOAT32_ARRAY, FLOAT64_ARRAY = 0, 5, 7, 9, 17, 18, 20
UCHAR_ARRAY, STRING, BUFFER, CUSTOM = 26, 27, 28, 29
EPERM, EINVAL, ENOTSUP = 1, 22, 95


class Genop:
    """Genop calls of one session."""

    def __init__(self, client: GoogleClient, session: int) -> None:
        self.client = client
        self.session = session

    def run(self, opcode: int, read: Sequence[Any], write: Sequence[Any]) -> list[bytes]:
        first = self.client.arg(bytes([opcode]), UINT8)
        answer = self.client.call(
            "Genop", session_id=self.session, read_args=[first, *read], write_args=[*write]
        ).write_args
        assert [arg.size for arg in answer] == [len(arg.buf) for arg in answer]
        assert [(len(arg.buf), arg.arg_type) for arg in answer] == [(len(arg.buf), arg.arg_type) for arg in write]
        return [arg.buf for arg in answer]

    def errno(self, opcode: int, read: Sequence[Any], write: Sequence[Any]) -> int | None:
        with pytest.raises(RemoteError) as caught:
            self.run(opcode, read, write)
        assert caught.value.code in (13, 7)
        assert caught.value.type_url == "type.googleapis.com/vaccel.ProtoError"
        return caught.value.errno

    def floats(self, values: Any) -> Any:
        return self.client.arg(np.asarray(values, "<f4").tobytes(), FLOAT32_ARRAY)

    def room(self, size: int, kind: int = RAW) -> Any:
        return self.client.arg(bytes(size), kind)

    def int64(self, value: int) -> Any:
        return self.client.arg(struct.pack("<q", value), INT64)

    def int32(self, value: int) -> Any:
        return self.client.arg(struct.pack("<i", value), INT32)

    def sgemm(self, m: int, n: int, k: int, a: Any, b: Any, c: Any, **values: Any) -> tuple[list[Any], list[Any]]:
        read = [
            *map(self.int64, (m, n, k)),
            self.client.arg(struct.pack("<f", values.get("alpha", 1.0)), FLOAT32),
            self.floats(a),
            self.int64(values.get("lda", k)),
            self.floats(b),
            self.int64(values.get("ldb", n)),
            self.client.arg(struct.pack("<f", values.get("beta", 0.0)), FLOAT32),
            self.int64(values.get("ldc", n)),
        ]
        return read, [self.floats(c)]


@pytest.fixture
def genop(client: GoogleClient, session: int) -> Genop:
    return Genop(client, session)


def picture() -> bytes:
    stream = BytesIO()
    Image.effect_noise((300, 200), 80).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def test_sgemm_multiplies_row_major_matrices_with_leading_dimensions(genop: Genop) -> None:
    random = np.random.default_rng(1)
    a, b, c = (random.random(shape, np.float32) for shape in ((5, 9), (7, 6), (5, 8)))
    read, write = genop.sgemm(5, 4, 7, a, b, c, alpha=0.5, beta=2.0, lda=9, ldb=6, ldc=8)
    (out,) = genop.run(17, read, write)
    got = np.frombuffer(out, "<f4").reshape(5, 8)
    np.testing.assert_allclose(got[:, :4], 0.5 * a[:, :7] @ b[:, :4] + 2 * c[:, :4], rtol=1e-5)
    np.testing.assert_array_equal(got[:, 4:], c[:, 4:])


def test_sgemm_does_not_read_c_when_beta_is_zero(genop: Genop) -> None:
    read, write = genop.sgemm(1, 1, 1, [2], [3], [np.nan])
    assert np.frombuffer(genop.run(17, read, write)[0], "<f4") == 6


@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 3},
        {"n": 3},
        {"k": 3},
        {"m": 0},
        {"k": -1},
        {"lda": 1},
        {"ldb": 3},
        {"ldc": 1 << 62},
        {"m": 1 << 62},
        {"m": (1 << 63) - 1, "n": (1 << 63) - 1, "k": (1 << 63) - 1},
    ],
)
def test_sizes_that_reach_beyond_an_array_are_refused(genop: Genop, sizes: dict[str, int]) -> None:
    given = {"m": 2, "n": 2, "k": 2, "lda": 2, "ldb": 2, "ldc": 2} | sizes
    m, n, k = given.pop("m"), given.pop("n"), given.pop("k")
    read, write = genop.sgemm(m, n, k, np.ones(4), np.ones(4), np.ones(4), **given)
    assert genop.errno(17, read, write) == EINVAL


def test_minmax_finds_the_least_and_greatest_within_the_thresholds(genop: Genop) -> None:
    data = np.array([-3.0, 0.5, 2.0, 8.5, 90.0])
    read = [genop.client.arg(data.tobytes(), RAW), genop.int32(4), genop.int32(0), genop.int32(8)]
    out, least, greatest = genop.run(22, read, [genop.room(32), genop.room(8), genop.room(8)])
    assert out == data[:4].tobytes()
    assert struct.unpack("<dd", least + greatest) == (0.5, 2.0)


@pytest.mark.parametrize(("count", "room"), [(6, 48), (0, 8), (-1, 8), (5, 32), (1 << 30, 8)])
def test_minmax_counts_that_do_not_fit_are_refused(genop: Genop, count: int, room: int) -> None:
    read = [genop.client.arg(bytes(40), RAW), genop.int32(count), genop.int32(0), genop.int32(8)]
    assert genop.errno(22, read, [genop.room(room), genop.room(8), genop.room(8)]) == EINVAL


def test_the_fpga_operations_compute(genop: Genop) -> None:
    a, b = np.arange(9, dtype="<f4"), np.arange(9, 18, dtype="<f4")
    pair = [genop.floats(a), genop.floats(b)]
    whole = np.arange(5, dtype="<i4").tobytes()
    assert genop.run(18, [genop.client.arg(whole, RAW)], [genop.room(20)]) == [whole]
    product = genop.run(19, pair, [genop.room(36)])[0]
    assert product == (a.reshape(3, 3) @ b.reshape(3, 3)).tobytes()
    assert genop.run(20, pair, [genop.room(36), genop.room(36)]) == [(a + b).tobytes(), (a * b).tobytes()]
    assert genop.run(21, pair, [genop.room(36)]) == [(a + b).tobytes()]


@pytest.mark.parametrize("opcode", [18, 19, 20, 21])
def test_the_fpga_operations_refuse_lengths_that_do_not_fit(genop: Genop, opcode: int) -> None:
    reads, writes = (1 if opcode == 18 else 2), (2 if opcode == 20 else 1)
    for size, room in ((16, 12), (16, 20), (15, 15), (16, 1)):
        read = [genop.client.arg(bytes(size), RAW)] * reads
        assert genop.errno(opcode, read, [genop.room(room)] * writes) == EINVAL
    if opcode == 19:
        assert genop.errno(19, [genop.floats(np.ones(8))] * 2, [genop.room(32)]) == EINVAL
    if reads == 2:
        assert genop.errno(opcode, [genop.floats(np.ones(4)), genop.floats(np.ones(9))], [genop.room(16)] * writes)


def test_classify_writes_the_empty_name_of_no_picture_and_the_label(genop: Genop) -> None:
    name, text = genop.run(
        3,
        [genop.client.arg(picture(), BUFFER)],
        [genop.room(64, UCHAR_ARRAY), genop.room(100, UCHAR_ARRAY)],
    )
    assert name == bytes(64)
    assert text.rstrip(b"\0")
    assert text[-1:] == b"\0"
    whole = genop.client.call("ImageClassification", session_id=genop.session, image=picture()).tags
    assert len(whole) == 1024


def test_a_label_is_cut_to_the_room_that_there_is(genop: Genop) -> None:
    _name, text = genop.run(
        3, [genop.client.arg(picture(), BUFFER)], [genop.room(1, UCHAR_ARRAY), genop.room(4, UCHAR_ARRAY)]
    )
    assert len(text) == 4
    assert text[3:] == b"\0"


def test_a_picture_operation_without_a_model_says_that_a_manifest_is_missing(genop: Genop) -> None:
    arguments = [genop.client.arg(picture(), BUFFER)], [genop.room(64, UCHAR_ARRAY)]
    assert genop.errno(7, *arguments) == ENOTSUP
    with pytest.raises(RemoteError, match="add a manifest"):
        genop.run(7, *arguments)


@pytest.mark.parametrize(
    ("opcode", "model", "answer"),
    [
        (4, "centernet", rb"bird 0\.\d\d at \d+,\d+,\d+,\d+"),
        (5, "selfie-segmentation", rb"(background|person) \d+\.\d%"),
        (6, "movenet-lightning", rb"nose 0\.\d\d at \d+,\d+; left eye"),
    ],
)
def test_detection_segmentation_and_pose_answer_with_whole_entries_of_text(
    genop: Genop, models: Path, opcode: int, model: str, answer: bytes
) -> None:
    if not (models / model).is_dir():
        pytest.skip(f"the model {model} is not built: run `make models`")
    image = genop.client.arg(fetch_photos()[15].path.read_bytes(), BUFFER)
    (text,) = genop.run(opcode, [image], [genop.room(100, UCHAR_ARRAY)])
    assert len(text) == 100
    assert re.match(answer, text)
    line = text.rstrip(b"\0").decode()
    assert all(re.fullmatch(r"[\w ]+ \d\.\d\d at [\d,]+|\w+ [\d.]+%", entry) for entry in line.split("; "))
    wrong = genop.client.arg(b"no picture", BUFFER)
    assert genop.errno(opcode, [wrong], [genop.room(100, UCHAR_ARRAY)]) == EINVAL


@pytest.mark.parametrize("opcode", [1, 2])
def test_running_libraries_is_off_and_the_answer_names_the_rule(genop: Genop, opcode: int) -> None:
    read = [genop.client.arg(b"/lib/x86_64-linux-gnu/libc.so.6\0", STRING), genop.client.arg(b"abort\0", STRING)]
    if opcode == 2:
        read[0] = genop.int64(1)
    with pytest.raises(RemoteError, match=r"rule \[defaults\] exec = false") as caught:
        genop.run(opcode, read, [genop.room(4)])
    assert (caught.value.code, caught.value.errno) == (7, EPERM)


@pytest.mark.parametrize("opcode", [*range(8, 17), 23])
def test_operations_that_genop_does_not_carry_are_not_supported(genop: Genop, opcode: int) -> None:
    assert genop.errno(opcode, [genop.room(4)], [genop.room(4)]) == ENOTSUP


@pytest.mark.parametrize("opcode", [0, 24, 255])
def test_numbers_that_are_no_operation_are_invalid(genop: Genop, opcode: int) -> None:
    assert genop.errno(opcode, [], []) == EINVAL


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 17, 18, 19, 20, 21, 22])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1), (11, 1), (4, 4)])
def test_counts_of_arguments_are_exact(genop: Genop, opcode: int, counts: tuple[int, int]) -> None:
    assert genop.errno(opcode, [genop.room(4)] * counts[0], [genop.room(4)] * counts[1]) == EINVAL


def test_types_are_checked_where_vaccel_checks_them(genop: Genop) -> None:
    image = genop.client.arg(picture(), UCHAR_ARRAY)
    out = [genop.room(8, UCHAR_ARRAY)] * 2
    assert genop.errno(3, [image], out) == EINVAL
    assert genop.errno(3, [genop.client.arg(picture(), BUFFER)], [genop.room(8)] * 2) == EINVAL
    for index in range(10):
        read, write = genop.sgemm(1, 1, 1, [1], [1], [1])
        read[index].arg_type = CUSTOM
        assert genop.errno(17, read, write) == EINVAL
    read, write = genop.sgemm(1, 1, 1, [1], [1], [1])
    read[0] = genop.client.arg(bytes(4), INT64)
    assert genop.errno(17, read, write) == EINVAL
    read, write = genop.sgemm(1, 1, 1, [1], [1], [1])
    write[0].arg_type = FLOAT64_ARRAY
    assert genop.errno(17, read, write) == EINVAL


def test_an_opcode_is_one_byte_of_type_uint8(genop: Genop) -> None:
    for first in (genop.client.arg(bytes(2), UINT8), genop.client.arg(b"\x03", RAW), genop.int32(3)):
        with pytest.raises(RemoteError) as caught:
            genop.client.call("Genop", session_id=genop.session, read_args=[first])
        assert caught.value.errno == EINVAL
    with pytest.raises(RemoteError) as caught:
        genop.client.call("Genop", session_id=genop.session)
    assert caught.value.errno == EINVAL


def test_a_size_that_is_not_the_length_is_a_failed_conversion(genop: Genop) -> None:
    for arg in (genop.client.arg(bytes(4), RAW, size=5), genop.client.arg(bytes(4), 30)):
        with pytest.raises(RemoteError) as caught:
            genop.run(18, [arg], [genop.room(4)])
        assert (caught.value.code, caught.value.error.type) == (13, 6)
        assert caught.value.error.status.message
    assert genop.errno(18, [genop.client.arg(b"", RAW)], [genop.room(4)]) == EINVAL


def test_regions_of_a_session_tell_where_genop_spent_its_time(genop: Genop) -> None:
    genop.run(18, [genop.client.arg(bytes(4), RAW)], [genop.room(4)])
    profiler = genop.client.call("GetProfiler", session_id=genop.session).profiler
    regions = {entry.key: entry.value.samples for entry in profiler.regions}
    assert profiler.component_name == "vaccel-rpc-agent"
    assert set(regions) == {
        "genop > read_args",
        "genop > write_args",
        "genop > sess.genop",
        "genop > resp_write_args",
    }
    assert all(sample.start > 0 for samples in regions.values() for sample in samples)
    assert not genop.client.call("GetProfiler", session_id=12345).HasField("profiler")
