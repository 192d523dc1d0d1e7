"""`Arg`: one argument of Genop and of the exec operations."""

from __future__ import annotations

from remora.vaccel.values import to_c
from remora.wire.vaccel import GenopArg
from remora.wire.vaccel_enums import ArgType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Arg:
    """A value and its type on the wire.

    Args:
        data: A number, text, a list of numbers, or any contiguous buffer (bytes, bytearray, array.array, numpy).
        type_: An `ArgType`. It decides the C size of numbers; without it an int has 4 bytes (8 if it needs them) and
            a float 4.
        custom_type_id: For `ArgType.CUSTOM`.
    """

    __slots__ = ("_value", "_view", "_restore", "_type", "_custom_type_id")

    def __init__(self, data: Any, type_: int = ArgType.RAW, custom_type_id: int = 0) -> None:
        self._value = data
        self._type = int(type_)
        self._custom_type_id = custom_type_id
        self._view, self._restore = to_c(data, self._type)

    @property
    def buf(self) -> Any:
        """The value; after an operation that wrote to this argument, what it wrote."""
        return self._value

    @property
    def type(self) -> int:
        from remora.vaccel.types import ArgType as Names

        return Names(self._type)

    def to_wire(self) -> GenopArg:
        return GenopArg(buf=self._view, size=len(self._view), arg_type=self._type, custom_type_id=self._custom_type_id)

    def room(self) -> int:
        """Return the bytes that an operation may write."""
        return len(self._view)

    def written(self, data: memoryview) -> None:
        """Take what an operation wrote."""
        self._value = self._restore(data)
        self._view, self._restore = to_c(self._value, self._type)

    def __repr__(self) -> str:
        return f"Arg({self._value!r}, type_={self._type})"
