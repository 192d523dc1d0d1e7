"""Inference jobs and their answers as datagrams: numbers of fixed size, and behind them what seldom changes, as JSON.

Names, types and shapes are the same from one job of a model to the next. Each side keeps what it made of their bytes,
so that a job is put together and taken apart without JSON: with cold caches that took longer than a small model.
Whoever does not know the bytes parses them; a datagram needs no other before it.

job      0xB6  shared u8  inputs u16  id u64  model u32  arena of inputs u32  arena of outputs u32  room at u64
         its length u64, then for each input its offset u64, then [[output names], [[name, dtype, shape], ...]]
answer   0xB7  id u64  us u64  all u64  outputs at u64, then [[name, dtype, shape, offset from there, length], ...]

Little-endian. Everything else that agent and worker say to each other is in `protocol`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import TypeVar, cast

from remora.errors import ProtocolError
from remora.wire.remora_v1 import DTYPES
from remora.workers.contract import TensorPlace, TensorSpec, TensorView
from remora.workers.layout import Layout
from remora.workers.protocol import Message, encode_value, outputs_of, parse

JOB, ANSWER = 0xB6, 0xB7
_JOB = struct.Struct("<BBHQIIIQQ")
_ANSWER = struct.Struct("<BQQQQ")
_MOST_US = 1 << 40
_MOST_KNOWN = 512
#: Longer ones are parsed each time: what is remembered of a hostile worker's words must be bounded.
_LONGEST_KNOWN = 4096

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_forms: dict[tuple[object, ...], bytes] = {}
_jobs: dict[bytes, tuple[list[str], list[tuple[str, str, tuple[int, ...], int]]]] = {}
_layouts: dict[tuple[str, bytes], tuple[Sequence[TensorSpec], tuple[TensorPlace, ...], int]] = {}


def pack_job(
    job_id: int,
    model: int,
    arenas: tuple[int, int],
    room: tuple[int, int],
    inputs: Sequence[TensorView],
    offsets: Sequence[int],
    outputs: Sequence[str],
    *,
    shared: bool,
) -> bytes:
    """Return a job's datagram.

    Args:
        arenas: Of the inputs, and of the outputs.
        room: Where outputs may lie: offset and length.
        offsets: Where the inputs lie.
    """
    key = (tuple(outputs), *[(one.name, one.dtype, one.shape) for one in inputs])
    form = _forms.get(key)
    if form is None:
        form = encode_value([list(outputs), [[one.name, one.dtype, one.shape] for one in inputs]])
        _remember(_forms, key, form)
    count = len(offsets)
    head = _JOB.pack(JOB, shared, count, job_id, model, *arenas, *room)
    return head + struct.pack(f"<{count}Q", *offsets) + form


def unpack_job(data: bytes) -> Message:
    """Return a job as a message, with `form`: bytes that stand for all that is no number. For workers."""
    _kind, shared, count, job_id, model, arena, out_arena, offset, length = _JOB.unpack_from(data)
    start = _JOB.size + 8 * count
    form = data[start:]
    known = _jobs.get(form)
    if known is None:
        names, specs = cast(tuple[list[str], list[tuple[str, str, list[int]]]], parse(form))  # the agent is trusted
        known = names, [(name, dtype, tuple(shape), prod(shape) * DTYPES[dtype]) for name, dtype, shape in specs]
        _remember(_jobs, form, known)
    places = struct.unpack_from(f"<{count}Q", data, _JOB.size)
    return {
        "t": "infer",
        "id": job_id,
        "m": model,
        "a": arena,
        "b": out_arena,
        "off": offset,
        "len": length,
        "shared": bool(shared),
        "out": known[0],
        "in": [(*spec[:3], place, spec[3]) for spec, place in zip(known[1], places, strict=True)],
        "form": form,
    }


def pack_answer(job_id: int, run_us: int, whole_us: int, start: int, layout: Layout) -> bytes:
    """Return the datagram of a job that was done."""
    return _ANSWER.pack(ANSWER, job_id, run_us, whole_us, start) + layout.encoded


def unpack_answer(data: bytes) -> Message:
    """Return an answer: id, us, all if there is one, `at`, and the bytes of its `layout`.

    Raises:
        ProtocolError: it is cut off, or a number is impossible.
    """
    if len(data) < _ANSWER.size:
        raise ProtocolError("the worker sent an answer that is cut off")
    _kind, job_id, run_us, whole_us, start = _ANSWER.unpack_from(data)
    if run_us > _MOST_US or whole_us > _MOST_US:
        raise ProtocolError("the worker sent an impossible time")
    message = {"t": "done", "id": job_id, "us": run_us, "at": start, "layout": data[_ANSWER.size :]}
    if whole_us:
        message["all"] = whole_us
    return message


def places_of(
    message: Message, model: str, wanted: Sequence[TensorSpec], offset: int, size: int
) -> tuple[TensorPlace, ...]:
    """Return where an answer's outputs lie, relative to its `at`, if they are those wanted and all lie in the block.

    The same value is returned for the same outputs.

    Raises:
        ProtocolError: they are not, or do not.
    """
    layout = message["layout"]
    known = _layouts.get((model, layout))
    if known is None or known[0] != wanted:
        try:
            value = parse(layout)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("the worker sent an answer without a list of outputs") from error
        places = outputs_of(value, wanted, 0, 1 << 50)
        known = wanted, places, max((place[3] + place[4] for place in places), default=0)
        if len(layout) <= _LONGEST_KNOWN:
            _remember(_layouts, (model, layout), known)
    start = message["at"]
    if start < offset or start + known[2] > offset + size:
        raise ProtocolError("the worker sent an output that lies outside its block")
    return known[1]


def _remember(table: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(table) >= _MOST_KNOWN:
        table.clear()
    table[key] = value
