"""Arithmetic without a model, and that it never reaches beyond its arrays even if the agent let it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.backends import linalg
from remora.backends.contract import Stop
from remora.errors import CancelledError, InvalidArgumentError

SIZES = ("m", "n", "k", "lda", "ldb", "ldc")


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 3)] * 3), st.floats(-2, 2, width=32))
def test_sgemm_is_what_numpy_multiplies(sizes: tuple[int, ...], gaps: tuple[int, ...], beta: float) -> None:
    m, n, k = sizes
    strides = (k + gaps[0], n + gaps[1], n + gaps[2])
    random = np.random.default_rng(m * n * k)
    a, b, c = (random.random((rows, step), np.float32) for rows, step in zip((m, k, m), strides, strict=True))
    numbers = dict(zip(SIZES, (*sizes, *strides), strict=True)) | {"alpha": 1.5, "beta": beta}
    out = np.empty(c.size, np.float32)
    linalg.compute("sgemm", {"a": a.ravel(), "b": b.ravel(), "c": c.ravel()}, numbers, [out], Stop())
    expected = c.copy()
    expected[:, :n] = 1.5 * a[:, :k] @ b[:, :n] + beta * c[:, :n]
    np.testing.assert_allclose(out.reshape(c.shape), expected, rtol=1e-4, atol=1e-5)


@given(st.tuples(*[st.integers(-2, 9)] * 6))
def test_sizes_beyond_an_array_are_refused_and_never_read(sizes: tuple[int, ...]) -> None:
    m, n, k, lda, ldb, ldc = sizes
    arrays = {name: np.ones(8, np.float32) for name in "abc"}
    numbers = dict(zip(SIZES, sizes, strict=True)) | {"alpha": 1.0, "beta": 0.0}
    shapes = ((m, k, lda), (k, n, ldb), (m, n, ldc))
    fits = all(r > 0 and c > 0 and s >= c and (r - 1) * s + c <= 8 for r, c, s in shapes)
    out = np.zeros(8, np.float32)
    if fits:
        linalg.compute("sgemm", arrays, numbers, [out], Stop())
        assert out[0] == k
    else:
        with pytest.raises(InvalidArgumentError):
            linalg.compute("sgemm", arrays, numbers, [out], Stop())


def test_a_stopped_run_does_not_compute() -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(CancelledError):
        linalg.compute("arraycopy", {"a": np.ones(1)}, {}, [np.ones(1)], stop)


def test_minmax_of_nothing_within_the_thresholds_is_not_a_number() -> None:
    out = [np.empty(2), np.empty(1), np.empty(1)]
    linalg.compute("minmax", {"data": np.array([1.0, 9.0])}, {"low": 3, "high": 5}, out, Stop())
    assert np.isnan(out[1])
    assert np.isnan(out[2])


def test_what_does_not_fit_together_is_refused() -> None:
    for name, arrays in (("nonsense", {}), ("sgemm", {}), ("vectoradd", {"a": np.ones(2), "b": np.ones(3)})):
        with pytest.raises(InvalidArgumentError):
            linalg.compute(name, arrays, {}, [np.ones(1)], Stop())
