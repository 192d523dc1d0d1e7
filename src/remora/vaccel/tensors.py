"""`Tensor`: numbers with dimensions and one of a service's element types. Three services, three sets of types.

A tensor keeps a buffer, never a list: `data` makes a list when it is asked for, as vaccel-python's does.
"""

from __future__ import annotations

import struct
import sys
from array import array
from importlib import import_module

from remora.client.tensors import FORMAT_OF_DTYPE
from remora.vaccel.errors import NullPointerError
from remora.vaccel.values import flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

    T = TypeVar("T", bound="Tensor")


class Tensor:
    """A tensor of one of vAccel's services.

    Args:
        dims: Sizes of the dimensions, outermost first.
        data_type: A member of the service's `TensorType`.
        data: A list of numbers, or any contiguous buffer, row-major and little-endian.

    Raises:
        ValueError: the type cannot be computed with, or the data has another size than dims and type say.
    """

    #: Number of each element type that has a numpy name.
    DTYPES: ClassVar[Mapping[int, str]] = {}
    TENSOR_TYPE: ClassVar[Any] = int

    __slots__ = ("_dims", "_type", "_view")

    def __init__(self, dims: Sequence[int], data_type: int, data: Any) -> None:
        code = FORMAT_OF_DTYPE[self._dtype(data_type)]
        if isinstance(data, (list, tuple)):
            if code == "e" or code == "?":
                data = struct.pack(f"<{len(data)}{code}", *data)
            else:
                data = array(code, data)
        self._set(dims, data_type, flat(data))

    def _set(self, dims: Sequence[int], data_type: int, view: memoryview) -> None:
        expected = struct.calcsize(FORMAT_OF_DTYPE[self._dtype(data_type)])
        for size in dims:
            expected *= size
        if expected != len(view):
            raise ValueError(f"dims {list(dims)} of {self._dtype(data_type)} need {expected} bytes, got {len(view)}")
        self._dims: Optional[List[int]] = list(dims)
        self._type = data_type
        self._view = view

    @classmethod
    def _dtype(cls, data_type: int) -> str:
        dtype = cls.DTYPES.get(int(data_type))
        if dtype is None:
            names = ", ".join(str(cls.TENSOR_TYPE(number).name) for number in cls.DTYPES)
            raise ValueError(f"unsupported TensorType {data_type!r}; supported: {names}")
        return dtype

    @classmethod
    def from_buffer(cls: Type[T], dims: Sequence[int], data_type: int, data: Any) -> T:
        """Make a tensor on a buffer, without a copy."""
        made = cls.__new__(cls)
        made._set(dims, data_type, flat(data))
        return made

    from_bytes = from_buffer

    @classmethod
    def from_numpy(cls: Type[T], data: Any) -> T:
        """Make a tensor on a numpy array; copied only if it is not contiguous and little-endian.

        Raises:
            ValueError: the service has no such element type.
        """
        import numpy

        numbers = {dtype: number for number, dtype in cls.DTYPES.items()}
        if data.dtype.name not in numbers:
            raise ValueError(f"unsupported numpy dtype {data.dtype.name}; supported: {', '.join(numbers)}")
        contiguous: Any = numpy.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<"))
        return cls.from_buffer(data.shape or (1,), cls.TENSOR_TYPE(numbers[data.dtype.name]), contiguous)

    @classmethod
    def from_torch(cls: Type[T], data: Any) -> T:
        """Make a tensor on a PyTorch tensor's memory (on the CPU)."""
        return cls.from_numpy(data.detach().cpu().contiguous().numpy())

    @classmethod
    def empty(cls: Type[T]) -> T:
        """Make a tensor without anything, as a place for a result."""
        made = cls.__new__(cls)
        made._dims = None
        return made

    def _filled(self) -> memoryview:
        if self._dims is None:
            raise NullPointerError(f"this {type(self).__name__}")
        return self._view

    @property
    def dims(self) -> List[int]:
        self._filled()
        return list(self._dims or ())

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.dims)

    @property
    def data_type(self) -> Any:
        self._filled()
        return self.TENSOR_TYPE(self._type)

    @property
    def data(self) -> List[Any]:
        """The numbers as a flat list: slow for large tensors, `as_numpy` and `as_memoryview` are not."""
        view, code = self._filled(), FORMAT_OF_DTYPE[self._dtype(self._type)]
        if code == "e" or sys.byteorder != "little":
            return list(struct.unpack(f"<{len(view) // struct.calcsize(code)}{code}", view))
        typed: Any = view.cast(code)  # type: ignore[call-overload]  # a code that is not a literal
        return list(typed.tolist()) if len(view) else []

    def as_memoryview(self) -> memoryview:
        return self._filled()

    def as_bytelike(self) -> memoryview:
        return self._filled()

    def to_bytes(self) -> bytes:
        return bytes(self._filled())

    def as_numpy(self) -> Any:
        """Return a numpy array on the same memory. Imports numpy."""
        import numpy

        return numpy.frombuffer(self._filled(), dtype=self._dtype(self._type)).reshape(self._dims)

    def as_torch(self) -> Any:
        """Return a PyTorch tensor of a copy. Imports torch."""
        return import_module("torch").from_numpy(self.as_numpy().copy())

    def to_wire(self, message: Any) -> Any:
        """Return the tensor as `message`, the service's class for it."""
        return message(data=self._filled(), dims=self.dims, type=int(self._type))

    @classmethod
    def from_wire(cls: Type[T], message: Any) -> T:
        return cls.from_buffer(message.dims, message.type, message.data)

    def __repr__(self) -> str:
        if self._dims is None:
            return f"<{type(self).__name__} (empty)>"
        return f"<{type(self).__name__} dims={self._dims} data_type={self.data_type.name}>"
