"""What the agent and a worker say to each other over two Unix SEQPACKET sockets.

One datagram is one JSON object; tensors never travel here, only where they lie in an arena. Control and jobs have a
socket each: every job thread of a worker receives from the job socket itself (the kernel hands each datagram to one
thread, so there is no dispatcher between), and a cancel still arrives when all of them are busy.

control, agent -> worker       assign{shared, memory, threads, device}  arena{id, size}+fd  drop{id}
                               load{m, key, format, digest, task, manifest, classes, threads}+fd  unload{m}
                               load{m, key, format, digests}              a library: its files are at library_path(n)
                               measure{m, shapes, most, ms}
                               cancel{id}  block{id, b, off, len}         answer to `need`; len 0: refused
control, worker -> agent       hello{}  arena{id}  loaded{m, inputs, outputs, device, by, mem}  refused{m, error}
                               measured{m, curve, threads, rows}  measured{m, error}
jobs, agent -> worker          noop{id}  infer: see `packed`
                               classify | detect | pose{id, m, a, image, top}
                               segment | depth{id, m, a, image, b, off, len}
                               compute{id, f, n, a, in, out, off}         function, numbers; `out` are specs
                               exec{id, m, f, a, in, out, off}            symbol; the last of `in` are `out` before
jobs, worker -> agent          done{id, us, out | labels}, of infer: see `packed`  failed{id, us, error}  need{id, len}

A batch is one datagram: `PACK`, and each job's datagram with its length before it; the worker packs the answers the
same way, except those of members that are given up, which come as soon as they are. `us` is a member's part of the run,
`all` the whole run.

`a` is the arena of the inputs and `b` that of the outputs; `shared`: the client may write to both meanwhile.
`m` numbers a load, so that an answer to an earlier one is not taken for this one's. A tensor is [name, dtype, shape,
offset, length]; a spec [name, dtype, shape]; an image [offset, length]; a label [class, score, number of its place...];
an error [code, message, fix]. The worker of a tenant may be hostile:
whatever it sends is checked here, and what does not fit is a `ProtocolError`, which costs it its life.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

from remora.errors import ProtocolError, RemoraError, from_code
from remora.wire.remora_v1 import DTYPES
from remora.workers.contract import Measurement, TensorPlace, TensorSpec

MAX_MESSAGE_BYTES = 64 * 1024
#: First byte of a pack; no single datagram begins with it.
PACK = 0xB5
_LENGTH = struct.Struct("<I")
MAX_DIMENSIONS = 16
_MAX_TEXT = 1000
_MAX_SPECS = 256
_MAX_POINTS = 64

#: A JSON object, before it is checked.
Message = dict[str, Any]


# json.dumps with options makes an encoder per call, and json.loads guesses the encoding in Python: both cost more than
# the work itself when the caches are cold, as they are after each run of a model.
_write = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_read = json.JSONDecoder().raw_decode


def library_path(number: int) -> str:
    """Return where a library's worker finds the n-th of its files."""
    return f"/library/{number}"


def encode(message: Message) -> bytes:
    return _write(message).encode()


def encode_value(value: object) -> bytes:
    """Return JSON that `parse` reads."""
    return _write(value).encode()


def parse(data: bytes) -> object:
    """Return the JSON value of a datagram, which must be nothing else.

    Raises:
        ValueError: it is not JSON.
    """
    written = data.decode()
    value, end = _read(written)
    if end != len(written):
        raise ValueError("more than one value")
    return value


def decode(data: bytes) -> Message:
    """Return the object of a datagram.

    Raises:
        ProtocolError: it is no JSON object.
    """
    try:
        message = parse(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the worker sent a message that is not JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise ProtocolError("the worker sent a message without a type")
    return message


def pack(datagrams: Sequence[bytes]) -> list[bytes]:
    """Return packs, as few as hold the datagrams; one datagram stays as it is."""
    packs: list[list[bytes]] = [[]]
    room = MAX_MESSAGE_BYTES - 1
    for data in datagrams:
        needed = _LENGTH.size + len(data)
        if packs[-1] and needed > room:
            packs.append([])
            room = MAX_MESSAGE_BYTES - 1
        packs[-1].append(data)
        room -= needed
    return [
        part[0] if len(part) == 1 else bytes((PACK,)) + b"".join(_LENGTH.pack(len(data)) + data for data in part)
        for part in packs
        if part
    ]


def unpack(data: bytes) -> Sequence[bytes]:
    """Return the datagrams of a pack; what is none is returned as it is.

    Raises:
        ProtocolError: its lengths are wrong.
    """
    if data[0] != PACK:
        return (data,)
    parts, start = [], 1
    while start < len(data):
        begin = start + _LENGTH.size
        if begin > len(data):
            raise ProtocolError("the worker sent a pack that is cut off")
        start = begin + _LENGTH.unpack_from(data, start)[0]
        if start > len(data) or start == begin:
            raise ProtocolError("the worker sent a pack with a wrong length")
        parts.append(data[begin:start])
    return parts


def whole(value: object, what: str, most: int) -> int:
    """Check a whole number between 0 and `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ProtocolError(f"the worker sent an impossible {what}")
    return value


def text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ProtocolError(f"the worker sent an impossible {what}")
    return value


def error_of(value: object) -> RemoraError:
    """Return the error that a worker reports."""
    code, message, fix = _sequence(value, "error", 3)
    error = from_code(whole(code, "error code", 16), text(message, "error message"))
    error.fix = text(fix, "fix") or None
    return error


def error_parts(error: RemoraError) -> list[object]:
    return [error.code, error.message[:_MAX_TEXT], (error.fix or "")[:_MAX_TEXT]]


def specs_of(value: object) -> tuple[TensorSpec, ...]:
    """Return the inputs or outputs of a model as its worker describes them."""
    if not isinstance(value, list) or len(value) > _MAX_SPECS:
        raise ProtocolError("the worker sent an impossible list of tensors")
    made = []
    for item in value:
        name, dtype, shape = _sequence(item, "tensor", 3)
        if (
            not isinstance(dtype, str)
            or (dtype and dtype not in DTYPES)
            or not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
        ):
            raise ProtocolError("the worker sent an impossible tensor description")
        if any(type(dim) is not int or not -1 <= dim < 1 << 40 for dim in shape):
            raise ProtocolError("the worker sent an impossible shape")
        made.append(TensorSpec(text(name, "tensor name"), dtype, tuple(shape)))
    return tuple(made)


def outputs_of(value: object, wanted: Sequence[TensorSpec], offset: int, size: int) -> tuple[TensorPlace, ...]:
    """Return where a job's outputs lie, if each is one that was asked for and lies whole inside the job's block."""
    items = _sequence(value, "list of outputs", len(wanted))
    return tuple(_output(item, spec, offset, size) for item, spec in zip(items, wanted, strict=True))


def _output(item: object, spec: TensorSpec, offset: int, size: int) -> TensorPlace:
    name, dtype, shape, start, length = _sequence(item, "output", 5)
    if name != spec.name or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError("the worker sent an output that was not asked for")
    if not isinstance(dtype, str) or dtype not in ((spec.dtype,) if spec.dtype else DTYPES):
        raise ProtocolError("the worker sent an output of a type that was not asked for")
    dims = tuple(whole(dim, "shape", 1 << 40) for dim in shape)
    whole(length, "output size", size)
    if whole(start, "output offset", offset + size) < offset or start + length > offset + size:
        raise ProtocolError("the worker sent an output that lies outside its block")
    if math.prod(dims) * DTYPES[dtype] != length:
        raise ProtocolError("the worker sent an output whose size and shape differ")
    return spec.name, dtype, dims, start, length


def labels_of(value: object, classes: int, top: int, numbers: int) -> list[tuple[int, float, tuple[float, ...]]]:
    """Return what was found in a picture: (class, score, place), each class below `classes`, `numbers` to a place."""
    if not isinstance(value, list) or len(value) > top:
        raise ProtocolError("the worker sent an impossible ranking")
    ranking = []
    for item in value:
        index, *found = _sequence(item, "label", 2 + numbers)
        whole(index, "class", classes - 1)
        if any(not isinstance(part, float | int) or not math.isfinite(part) for part in found):
            raise ProtocolError("the worker sent an impossible score")
        score, *place = map(float, found)
        ranking.append((index, score, tuple(place)))
    return ranking


def measurement_of(message: Message, memory_bytes: int) -> Measurement:
    """Return what a worker measured, each number within reason."""
    times, rates = message.get("curve"), message.get("threads")
    if not isinstance(times, list) or not isinstance(rates, list) or max(len(times), len(rates)) > _MAX_POINTS:
        raise ProtocolError("the worker sent an impossible measurement")
    curve = {}
    for item in times:
        rows, run_us = _sequence(item, "measurement", 2)
        curve[whole(rows, "number of rows", 1 << 20)] = float(whole(run_us, "time", 1 << 40))
    threads = {}
    for item in rates:
        count, rate = _sequence(item, "measurement", 2)
        if not isinstance(rate, float | int) or not 0 <= rate < 1e9:
            raise ProtocolError("the worker sent an impossible rate")
        threads[whole(count, "number of threads", 1 << 16)] = float(rate)
    return Measurement(curve, threads, message.get("rows") is True, memory_bytes)


def _sequence(value: object, what: str, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise ProtocolError(f"the worker sent an impossible {what}")
    return value
