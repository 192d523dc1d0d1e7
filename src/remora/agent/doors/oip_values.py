"""The protocol's values in ours and back: element types, JSON numbers, parameters. Pure functions, no requests.

JSON is refused here before it grows: its text, how deep it nests and how many lists and objects it holds are bounded,
because Python's objects take up to ten times the bytes that describe them. NaN and the infinities are no JSON.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from math import isfinite, prod
from typing import Any, NoReturn

from remora.agent.doors.oip_messages import InferTensorContents
from remora.agent.operations import MAX_RANK
from remora.errors import InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from remora.wire.protobuf import Limits
from remora.workers.contract import TensorSpec, TensorView

#: The protocol's element types by ours. BYTES and BF16 have none: no backend takes them.
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
#: struct's code for an element, and Python's types for it in JSON. FP16 has no JSON form.
_CODES: dict[str, tuple[str, frozenset[type]]] = {
    "BOOL": ("?", frozenset((bool,))),
    "UINT8": ("B", frozenset((int,))),
    "UINT16": ("H", frozenset((int,))),
    "UINT32": ("I", frozenset((int,))),
    "UINT64": ("Q", frozenset((int,))),
    "INT8": ("b", frozenset((int,))),
    "INT16": ("h", frozenset((int,))),
    "INT32": ("i", frozenset((int,))),
    "INT64": ("q", frozenset((int,))),
    "FP32": ("f", frozenset((int, float))),
    "FP64": ("d", frozenset((int, float))),
}
#: Bytes of an element's JSON with what separates it, where it is less than 20.
_LENGTHS = {"bool": 7, "uint8": 5, "int8": 6, "uint16": 7, "int16": 8, "uint32": 12, "int32": 13}
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_MAX_CONTAINERS = 1 << 18
_MAX_SIZE = 1 << 40

Parameters = Mapping[str, bool | int | float | str]


def dtype_of(name: str, datatype: str) -> str:
    """Return our name of an element type.

    Raises:
        InvalidArgumentError: there is none.
    """
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidArgumentError(
            f"tensor {name[:40]!r} has the datatype {datatype[:40]!r}, which no model here takes",
            fix=f"use one of {', '.join(DTYPES)}",
        )
    return dtype


def metadata(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Return tensors as the protocol describes them."""
    return [
        {"name": spec.name, "datatype": DATATYPES.get(spec.dtype, spec.dtype.upper()), "shape": list(spec.shape)}
        for spec in specs
    ]


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Refuse a shape that no tensor has, before anyone multiplies its sizes.

    Raises:
        InvalidArgumentError: too many dimensions, or a size that cannot be.
    """
    if len(shape) > MAX_RANK or not all(0 <= size < _MAX_SIZE for size in shape):
        raise InvalidArgumentError(
            f"the shape of tensor {name[:40]!r} has a size below 0 or beyond reason, or more than {MAX_RANK} dimensions"
        )


# -- JSON -------------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise InvalidArgumentError(f"{name} is no JSON", fix="send it as binary data")


def parse_json(text: memoryview, max_bytes: int) -> dict[str, Any]:
    """Return the object that a body's JSON text describes.

    Raises:
        ResourceExhaustedError: it is longer than allowed.
        InvalidArgumentError: it is no JSON object, or one that is nested or split up beyond any request.
    """
    if len(text) > max_bytes:
        error = ResourceExhaustedError(
            f"{len(text)} bytes of JSON were sent, {max_bytes} are allowed (limits.json_bytes)",
            fix="send tensors as binary data (Inference-Header-Content-Length)",
        )
        error.http_status = 413
        raise error
    raw = bytes(text)
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise InvalidArgumentError(
            f"the request's JSON has more than {_MAX_CONTAINERS} lists and objects", fix="send `data` flat, or binary"
        )
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
    except RecursionError as error:
        raise InvalidArgumentError("the request's JSON is nested too deep") from error
    except ValueError as error:  # also what is not UTF-8, and numbers of thousands of digits
        raise InvalidArgumentError(f"the request is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError("the request's JSON is not an object", fix='send {"inputs": [...]}')
    return value


def _flat(name: str, data: list[Any]) -> list[Any]:
    """Return nested lists as one list."""
    for _ in range(MAX_RANK):
        kinds = set(map(type, data))
        if list not in kinds:
            return data
        if kinds != {list}:
            raise InvalidArgumentError(f"the data of tensor {name[:40]!r} mixes lists and numbers")
        data = list(chain.from_iterable(data))
    raise InvalidArgumentError(f"the data of tensor {name[:40]!r} is nested deeper than {MAX_RANK} lists")


def pack(name: str, datatype: str, shape: Sequence[int], data: object) -> bytes:
    """Return a tensor's bytes from its JSON `data`, nested or flat.

    Raises:
        InvalidArgumentError: another number of elements, of another type, or out of range.
    """
    dtype_of(name, datatype)
    if datatype not in _CODES:
        raise InvalidArgumentError(f"{datatype} has no form in JSON (tensor {name[:40]!r})", fix="send binary data")
    if not isinstance(data, list):
        raise InvalidArgumentError(f"the data of tensor {name[:40]!r} is not a list")
    return _packed(name, datatype, shape, _flat(name, data))


def _packed(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> bytes:
    code, kinds = _CODES[datatype]
    if len(values) != prod(shape):
        raise InvalidArgumentError(
            f"tensor {name[:40]!r} of shape {list(shape)} has {prod(shape)} elements, {len(values)} were sent"
        )
    if not set(map(type, values)) <= kinds:
        raise InvalidArgumentError(f"tensor {name[:40]!r} has elements that are no {datatype}")
    try:
        if code in "fd" and not all(map(isfinite, values)):
            raise InvalidArgumentError(f"tensor {name[:40]!r} has elements that are not finite", fix="send binary data")
        return struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, OverflowError) as error:
        raise InvalidArgumentError(f"tensor {name[:40]!r} has elements out of the range of {datatype}") from error


def json_length(tensor: TensorView) -> int:
    """Return about how long a tensor's elements are as JSON."""
    return prod(tensor.shape) * _LENGTHS.get(tensor.dtype, 20)


def unpack(tensor: TensorView, max_bytes: int) -> list[Any]:
    """Return a tensor's elements for JSON.

    Args:
        max_bytes: How long their text may be.

    Raises:
        InvalidArgumentError: they have no JSON form.
        ResourceExhaustedError: they are too many.
    """
    datatype = DATATYPES.get(tensor.dtype, "")
    if datatype not in _CODES:
        raise InvalidArgumentError(
            f"output {tensor.name!r} is {datatype or tensor.dtype}, which has no form in JSON",
            fix="ask for binary_data",
        )
    code = _CODES[datatype][0]
    count, length = prod(tensor.shape), json_length(tensor)
    if length > max_bytes:
        raise ResourceExhaustedError(
            f"output {tensor.name!r} has {count} elements, about {length} bytes of JSON, and {max(0, max_bytes)} are "
            "left for them (limits.json_bytes)",
            fix="ask for binary_data",
        )
    values = list(struct.unpack(f"<{count}{code}", tensor.data))
    if code in "fd" and not all(map(isfinite, values)):
        raise InvalidArgumentError(
            f"output {tensor.name!r} holds NaN or an infinity, which JSON cannot carry", fix="ask for binary_data"
        )
    return values


# -- gRPC -------------------------------------------------------------------------------------------------------------


def pack_contents(name: str, datatype: str, shape: Sequence[int], contents: memoryview | bytes, most: int) -> bytes:
    """Return a tensor's bytes from an `InferTensorContents`. Raises as `pack`, and if there are more than `most`."""
    dtype_of(name, datatype)
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidArgumentError(f"{datatype} has no typed contents (tensor {name[:40]!r})", fix="send raw contents")
    expected = prod(shape)
    if expected > most:
        raise ResourceExhaustedError(
            f"tensor {name[:40]!r} has {expected} elements, {most} may be sent as typed contents (limits.json_bytes)",
            fix="send raw_input_contents",
        )
    decoded = InferTensorContents.decode(contents, limits=Limits(max_depth=1, max_elements=expected))
    values = getattr(decoded, field)
    if not values and expected:
        raise InvalidArgumentError(f"tensor {name[:40]!r} is {datatype}, so its data belongs into {field}")
    code, _kinds = _CODES[datatype]
    if code in "fd":  # as binary data, typed floats may be NaN
        if len(values) != expected:
            raise InvalidArgumentError(f"tensor {name[:40]!r} has {expected} elements, {len(values)} were sent")
        return struct.pack(f"<{expected}{code}", *values)
    return _packed(name, datatype, shape, values)


# -- parameters -------------------------------------------------------------------------------------------------------


def refuse_shared_memory(name: str, parameters: Mapping[str, object]) -> None:
    """
    Raises:
        UnimplementedError: the tensor is said to lie in shared memory.
    """
    if "shared_memory_region" in parameters:
        raise UnimplementedError(
            f"tensor {name[:40]!r} is in shared memory; system_shared_memory and cuda_shared_memory are not offered",
            fix="send binary data",
        )


def refuse_classification(name: str, parameters: Mapping[str, object]) -> None:
    """
    Raises:
        UnimplementedError: classes are asked for instead of the tensor.
    """
    if parameters.get("classification"):
        raise UnimplementedError(
            f"output {name[:40]!r} is asked for as classes; the classification extension is not offered",
            fix="ask for the tensor, or use Classify of the native protocol",
        )


def timeout_of(parameters: Mapping[str, object]) -> float | None:
    """Return the seconds that a request's `timeout` (microseconds) grants; None if it has none.

    Raises:
        InvalidArgumentError: it is no number of microseconds.
        UnimplementedError: the request belongs to a sequence.
    """
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.get(name):
            raise UnimplementedError(f"the request has {name}: models here keep no state between requests")
    timeout = parameters.get("timeout")
    if not timeout:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise InvalidArgumentError(f"timeout {str(timeout)[:40]!r} is not a number of microseconds")
    return min(timeout, 1 << 53) / 1e6
