"""Arithmetic on arrays that needs no model: vAccel's SGEMM, MinMax and FPGA operations, on numpy.

Each function is declared once, with the parameters and arrays it takes; the agent checks their sizes before anything is
allocated (`agent.compute`), and the checks here are the second fence: this code works on memory by strides, and an
agent's mistake must not become a read beyond an array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from remora.backends.contract import Array, Stop
from remora.errors import CancelledError, InvalidArgumentError

#: Multiplications between two looks at `stop`: 50 ms of a slow core.
_BLOCK_MULTIPLICATIONS = 1 << 27

Numbers = Mapping[str, float]
Arrays = Mapping[str, Array]
Function = Callable[[Arrays, Numbers, Sequence[Array], Stop], None]


def _matrix(array: Array, rows: int, columns: int, stride: int, name: str) -> Array:
    """Return a row-major matrix inside `array`, whose rows start `stride` elements apart."""
    if rows < 1 or columns < 1 or stride < columns or (rows - 1) * stride + columns > array.size:
        raise InvalidArgumentError(f"{rows}x{columns} with leading dimension {stride} does not lie in array {name!r}")
    step = array.itemsize
    return np.lib.stride_tricks.as_strided(array, (rows, columns), (stride * step, step))


def sgemm(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    """C <- alpha * A @ B + beta * C for row-major float32; what C holds between its rows stays as it is."""
    m, n, k = (int(numbers[name]) for name in ("m", "n", "k"))
    a = _matrix(arrays["a"], m, k, int(numbers["lda"]), "a")
    b = _matrix(arrays["b"], k, n, int(numbers["ldb"]), "b")
    out = into[0]
    np.copyto(out, arrays["c"])
    c = _matrix(out, m, n, int(numbers["ldc"]), "c")
    alpha, beta = np.float32(numbers["alpha"]), np.float32(numbers["beta"])
    rows = max(1, _BLOCK_MULTIPLICATIONS // (n * k))
    for first in range(0, m, rows):
        if stop.requested:
            raise CancelledError("the run was stopped")
        product = alpha * np.matmul(a[first : first + rows], b)
        if beta:  # BLAS: C is not read when beta is 0, so that it may hold anything
            product += beta * c[first : first + rows]
        c[first : first + rows] = product


def minmax(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    """The data again, and the least and the greatest of its values that lie within the thresholds (NaN for none)."""
    data = arrays["data"]
    np.copyto(into[0], data)
    inside = data[(data >= numbers["low"]) & (data <= numbers["high"])]
    into[1][0] = inside.min() if inside.size else math.nan
    into[2][0] = inside.max() if inside.size else math.nan


def arraycopy(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    np.copyto(into[0], arrays["a"])


def mmult(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    """The product of two square row-major matrices."""
    side = math.isqrt(arrays["a"].size)
    if side * side != arrays["a"].size or arrays["b"].size != side * side:
        raise InvalidArgumentError("the matrices are not square, or of different sizes")
    a, b, c = (array.reshape(side, side) for array in (arrays["a"], arrays["b"], into[0]))
    rows = max(1, _BLOCK_MULTIPLICATIONS // (side * side))
    for first in range(0, side, rows):
        if stop.requested:
            raise CancelledError("the run was stopped")
        c[first : first + rows] = np.matmul(a[first : first + rows], b)


def parallel(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    """The sums and the products of the elements of two vectors."""
    np.add(arrays["a"], arrays["b"], out=into[0])
    np.multiply(arrays["a"], arrays["b"], out=into[1])


def vectoradd(arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    np.add(arrays["a"], arrays["b"], out=into[0])


FUNCTIONS: Mapping[str, Function] = {
    "sgemm": sgemm,
    "minmax": minmax,
    "arraycopy": arraycopy,
    "mmult": mmult,
    "parallel": parallel,
    "vectoradd": vectoradd,
}


def compute(function: str, arrays: Arrays, numbers: Numbers, into: Sequence[Array], stop: Stop) -> None:
    """Run a function by its name, into arrays of the right sizes.

    Raises:
        InvalidArgumentError: there is no such function, or its arrays do not fit.
        CancelledError: `stop` was requested.
    """
    found = FUNCTIONS.get(function)
    if found is None:
        raise InvalidArgumentError(f"workers have no function {function!r}", fix=f"they have {', '.join(FUNCTIONS)}")
    if stop.requested:
        raise CancelledError("the run was stopped")
    try:
        with np.errstate(all="ignore"):  # overflow gives infinities here, as in BLAS
            found(arrays, numbers, into, stop)
    except (KeyError, IndexError, ValueError) as error:
        raise InvalidArgumentError(f"the arguments of {function} do not fit together: {error}") from error
