"""Calls functions of shared libraries as vAccel's exec operations do: `int f(read, nr_read, write, nr_write)`.

A library is machine code: once it is loaded, this process is its own, and everything that it must not do is up to what
is around the process (`workers.launcher`, `workers.seccomp`, `workers.cgroups`). What is here keeps an honest library
from being hurt by a mistake: arguments are copies, outputs have the size that was declared, and a result that says
otherwise is refused. Structures are those of vAccel's `arg.h`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.errors import (
    DataLossError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnimplementedError,
)


class _Arg(ctypes.Structure):
    """`struct vaccel_arg`."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("custom_type_id", ctypes.c_uint32),
        ("owned", ctypes.c_bool),
    )


@dataclass(frozen=True)
class Value:
    """One argument: its bytes, vAccel's number of its type, and the caller's own type where that is CUSTOM."""

    data: memoryview
    type: int
    custom_type_id: int = 0


class _Args:
    """An array of arguments in memory of its own, each with a NUL behind it for functions that look for one."""

    def __init__(self, values: Sequence[Value]) -> None:
        self._sizes = [len(value.data) for value in values]
        self._buffers = [(ctypes.c_char * (size + 1)) for size in self._sizes]
        self._memory = [kind() for kind in self._buffers]
        self.array = (_Arg * max(1, len(values)))()
        self.count = len(values)
        for value, memory, entry in zip(values, self._memory, self.array, strict=False):
            memoryview(memory).cast("B")[: len(value.data)] = value.data
            entry.buf = ctypes.addressof(memory)
            entry.size = len(value.data)
            entry.type, entry.custom_type_id = value.type, value.custom_type_id

    def written(self, symbol: str) -> list[memoryview]:
        """Return what the function left in each argument.

        Raises:
            InternalError: it put another buffer in place of one, or says that it wrote more than there was room for.
        """
        results = []
        for number, (memory, room, entry) in enumerate(zip(self._memory, self._sizes, self.array, strict=False)):
            if entry.buf != ctypes.addressof(memory):
                raise InternalError(
                    f"{symbol} replaced the buffer of write argument {number}",
                    fix="write into the one that it is given",
                )
            if entry.size > room:
                raise InternalError(
                    f"{symbol} says that it wrote {entry.size} bytes to write argument {number}, "
                    f"which has room for {room}",
                    fix="leave the size as it is, or lower it",
                )
            results.append(memoryview(memory).cast("B")[: entry.size])
        return results


class Library:
    """A loaded library with what it needs."""

    def __init__(self, files: Sequence[Path], digests: Sequence[str]) -> None:
        """Load the files in order, each open to the next ones; the last is the library itself.

        Raises:
            DataLossError: a file is not the one with its digest.
            InvalidArgumentError: the dynamic linker refuses one.
        """
        for path, digest in zip(files, digests, strict=True):
            if f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != digest:
                raise DataLossError(f"the file of library {digest} has other bytes", fix="upload the resource again")
        self._loaded: list[ctypes.CDLL] = []
        for number, path in enumerate(files):
            try:
                # Unresolved symbols are an error now and not in the middle of a call.
                self._loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL | _RTLD_NOW))
            except OSError as error:
                reason = str(error).replace(str(path), digests[number])
                raise InvalidArgumentError(
                    f"the library cannot be loaded: {reason}",
                    fix="send a shared object for this machine, and before it in the same resource what it needs",
                ) from error

    def call(self, symbol: str, read: Sequence[Value], write: Sequence[Value]) -> list[memoryview]:
        """Call a function and return what it wrote, one for each write argument.

        Raises:
            UnimplementedError: the library has no such symbol.
            InternalError: the function did not return 0, or what it returned does not fit.
            ResourceExhaustedError: there is no memory for copies of the arguments.
        """
        try:
            function = self._loaded[-1][symbol]
        except (AttributeError, ValueError) as error:
            raise UnimplementedError(
                f"the library has no function {symbol[:100]!r}", fix='export it, in C++ as extern "C"'
            ) from error
        function.restype = ctypes.c_int
        function.argtypes = (ctypes.POINTER(_Arg), ctypes.c_size_t, ctypes.POINTER(_Arg), ctypes.c_size_t)
        try:
            reads, writes = _Args(read), _Args(write)
        except MemoryError as error:
            raise ResourceExhaustedError("the arguments do not fit into the memory of the library's worker") from error
        status = function(reads.array, reads.count, writes.array, writes.count)
        if status != 0:
            raise InternalError(f"{symbol} returned {status}", fix="it returns 0 when all is well")
        return writes.written(symbol)


_RTLD_NOW = 2
