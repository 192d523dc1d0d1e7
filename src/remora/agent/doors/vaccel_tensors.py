"""Tensors of vAccel's three model services, and what their element types are called here.

TensorFlow Lite's types come with the numbers of its C library, one below those of vAccel's .proto file: that is what
every client sends. Types that no backend computes with (strings, complex, quantised) are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remora.agent import operations
from remora.errors import InvalidArgumentError
from remora.wire import vaccel
from remora.workers.contract import TensorView

_TORCH = vaccel.TorchDataType
_TF = vaccel.TfDataType
_LITE = vaccel.TfliteDataType
TORCH: Mapping[int, str] = {
    _TORCH.BYTE: "uint8",
    _TORCH.CHAR: "int8",
    _TORCH.SHORT: "int16",
    _TORCH.INT: "int32",
    _TORCH.LONG: "int64",
    _TORCH.HALF: "float16",
    _TORCH.FLOAT: "float32",
}
TF: Mapping[int, str] = {
    _TF.FLOAT: "float32",
    _TF.DOUBLE: "float64",
    _TF.INT32: "int32",
    _TF.UINT8: "uint8",
    _TF.INT16: "int16",
    _TF.INT8: "int8",
    _TF.INT64: "int64",
    _TF.BOOL: "bool",
    _TF.UINT16: "uint16",
    _TF.HALF: "float16",
    _TF.UINT32: "uint32",
    _TF.UINT64: "uint64",
}
TFLITE: Mapping[int, str] = {
    _LITE.FLOAT32: "float32",
    _LITE.INT32: "int32",
    _LITE.UINT8: "uint8",
    _LITE.INT64: "int64",
    _LITE.BOOL: "bool",
    _LITE.INT16: "int16",
    _LITE.INT8: "int8",
    _LITE.FLOAT16: "float16",
    _LITE.FLOAT64: "float64",
    _LITE.UINT64: "uint64",
    _LITE.UINT32: "uint32",
    _LITE.UINT16: "uint16",
}


def read(tensors: Sequence[Any], names: Iterable[str], types: Mapping[int, str]) -> list[TensorView]:
    """Return a request's tensors under the names of the model's inputs, checked.

    Raises:
        InvalidArgumentError: an element type that nothing computes with, no dimension, or bytes that do not fit.
    """
    views = []
    for name, given in zip(names, tensors, strict=True):
        dtype = types.get(given.type)
        if dtype is None:
            allowed = ", ".join(f"{number} ({known})" for number, known in types.items())
            raise InvalidArgumentError(f"tensor {name!r} has element type {given.type}", fix=f"allowed are {allowed}")
        if not given.dims:
            raise InvalidArgumentError(f"tensor {name!r} has no dimension", fix="give a single number the shape [1]")
        views.append(operations.tensor(name, dtype, given.dims, given.data))
    return views


def written(outputs: Sequence[TensorView], types: Mapping[int, str], cls: Any) -> list[Any]:
    """Return outputs as a response's tensors. A single number gets one dimension, as vAccel knows none without.

    Raises:
        InvalidArgumentError: the model's element type has no number in this service.
    """
    numbers = {dtype: number for number, dtype in types.items()}
    made = []
    for output in outputs:
        if output.dtype not in numbers:
            raise InvalidArgumentError(
                f"output {output.name!r} is {output.dtype}, which this vAccel operation cannot carry",
                fix=f"it carries {', '.join(numbers)}; add a Cast to the model",
            )
        made.append(cls(data=output.data, dims=list(output.shape) or [1], type=numbers[output.dtype]))
    return made
