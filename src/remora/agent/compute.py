"""Arithmetic as operations: which arrays and numbers each function takes, checked before anything is allocated.

vAccel's own agent believes a guest's m, n, k and leading dimensions, and reads beyond its arrays. Here every length is
derived from what was really sent, and numbers that do not fit it are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from remora.agent.operations import COMPUTE, Operation
from remora.errors import InvalidArgumentError
from remora.workers.contract import TensorSpec, TensorView

Buffers = Mapping[str, memoryview]
#: Multiplications of one request: one to two minutes of one core.
MAX_MULTIPLICATIONS = 1 << 41


def _array(name: str, dtype: str, item_bytes: int, data: memoryview) -> TensorView:
    count, rest = divmod(len(data), item_bytes)
    if rest or not count:
        raise InvalidArgumentError(f"array {name!r} has {len(data)} bytes, which is no whole number of {dtype} values")
    return TensorView(name, dtype, (count,), data)


def _floats(name: str, data: memoryview) -> TensorView:
    return _array(name, "float32", 4, data)


def _operation(
    function: str,
    inputs: tuple[TensorView, ...],
    results: tuple[TensorSpec, ...],
    deadline_s: float | None,
    numbers: Mapping[str, float] | None = None,
) -> Operation:
    return Operation(
        COMPUTE,
        function,
        inputs,
        deadline_s=deadline_s,
        function=function,
        numbers=numbers or {},
        results=results,
    )


def _check_matrix(array: TensorView, rows: int, columns: int, stride: int, sizes: str) -> None:
    if stride < columns:
        raise InvalidArgumentError(
            f"the leading dimension of {array.name} is {stride}, and its rows have {columns} elements ({sizes})"
        )
    needed = (rows - 1) * stride + columns
    if needed > array.shape[0]:
        raise InvalidArgumentError(
            f"matrix {array.name} of {rows}x{columns} with leading dimension {stride} needs {needed} elements, "
            f"{array.shape[0]} were sent ({sizes})"
        )


def _check_work(multiplications: int) -> None:
    if multiplications > MAX_MULTIPLICATIONS:
        raise InvalidArgumentError(
            f"the matrices take {multiplications} multiplications, at most {MAX_MULTIPLICATIONS} are allowed",
            fix="multiply them in blocks",
        )


def sgemm(
    numbers: Mapping[str, float], a: memoryview, b: memoryview, c: memoryview, deadline_s: float | None
) -> Operation:
    """C <- alpha * A @ B + beta * C, row-major; `numbers` has m, n, k, lda, ldb, ldc, alpha and beta.

    Raises:
        InvalidArgumentError: a size is not positive, or an array is shorter than the sizes say.
    """
    m, n, k, lda, ldb, ldc = (int(numbers[name]) for name in ("m", "n", "k", "lda", "ldb", "ldc"))
    sizes = f"m={m}, n={n}, k={k}, lda={lda}, ldb={ldb}, ldc={ldc}"
    if min(m, n, k, lda, ldb, ldc) < 1:
        raise InvalidArgumentError(f"every size of SGEMM must be 1 or more ({sizes})")
    arrays = _floats("a", a), _floats("b", b), _floats("c", c)
    for array, rows, columns, stride in zip(arrays, (m, k, m), (k, n, n), (lda, ldb, ldc), strict=True):
        _check_matrix(array, rows, columns, stride, sizes)
    _check_work(m * n * k)
    return _operation("sgemm", arrays, (TensorSpec("c", "float32", arrays[2].shape),), deadline_s, numbers)


def minmax(data: memoryview, count: int, low: int, high: int, out: int, deadline_s: float | None) -> Operation:
    """The first `count` doubles again (`out` bytes of room), and least and greatest of them within the thresholds."""
    array = _array("data", "float64", 8, data)
    if not 1 <= count <= array.shape[0]:
        raise InvalidArgumentError(f"MinMax of {count} values was asked for, {array.shape[0]} were sent")
    if out != 8 * count:
        raise InvalidArgumentError(f"MinMax of {count} values needs an output of {8 * count} bytes, not of {out}")
    if low > high:
        raise InvalidArgumentError(f"the low threshold {low} is above the high threshold {high}")
    used = TensorView("data", "float64", (count,), data[: 8 * count])
    one = [TensorSpec(name, "float64", (1,)) for name in ("min", "max")]
    results = (TensorSpec("out", "float64", (count,)), *one)
    return _operation("minmax", (used,), results, deadline_s, {"low": low, "high": high})


def _check_rooms(function: str, expected: int, *rooms: int) -> None:
    for room in rooms:
        if room != expected:
            raise InvalidArgumentError(f"{function} writes {expected} bytes, its output has room for {room}")


def arraycopy(a: memoryview, out: int, deadline_s: float | None) -> Operation:
    array = _array("a", "int32", 4, a)
    _check_rooms("ArrayCopy", len(a), out)
    return _operation("arraycopy", (array,), (TensorSpec("out", "int32", array.shape),), deadline_s)


def _pair(function: str, a: memoryview, b: memoryview, *rooms: int) -> tuple[TensorView, TensorView]:
    pair = _floats("a", a), _floats("b", b)
    if len(a) != len(b):
        raise InvalidArgumentError(f"{function} takes two arrays of one length, not of {len(a)} and {len(b)} bytes")
    _check_rooms(function, len(a), *rooms)
    return pair


def mmult(a: memoryview, b: memoryview, out: int, deadline_s: float | None) -> Operation:
    """The product of two square matrices."""
    pair = _pair("MMult", a, b, out)
    count = pair[0].shape[0]
    side = math.isqrt(count)
    if side * side != count:
        raise InvalidArgumentError(f"MMult takes square matrices, and {count} is no square number")
    _check_work(side**3)
    return _operation("mmult", pair, (TensorSpec("c", "float32", (count,)),), deadline_s)


def parallel(a: memoryview, b: memoryview, total: int, product: int, deadline_s: float | None) -> Operation:
    """The sums and the products of two vectors."""
    pair = _pair("Parallel", a, b, total, product)
    results = tuple(TensorSpec(name, "float32", pair[0].shape) for name in ("sum", "product"))
    return _operation("parallel", pair, results, deadline_s)


def vectoradd(a: memoryview, b: memoryview, out: int, deadline_s: float | None) -> Operation:
    pair = _pair("VectorAdd", a, b, out)
    return _operation("vectoradd", pair, (TensorSpec("c", "float32", pair[0].shape),), deadline_s)
