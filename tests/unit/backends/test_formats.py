"""A model's format chooses its backend; TensorFlow Lite's backend keeps the contract that all backends keep."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

import tiny_tflite
from remora.backends.contract import Limits, Stop
from remora.backends.formats import backend_for
from remora.backends.tflite import TfliteBackend
from remora.errors import CancelledError, InvalidArgumentError, UnimplementedError

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("model_format", "library", "backend", "extra"),
    [
        ("tflite", "ai_edge_litert.interpreter", "tflite", "tflite"),
        ("torchscript", "torch", "torch", "torch"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    model_format: str, library: str, backend: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"remora.backends.{backend}", raising=False)
    backend_for.cache_clear()
    with pytest.raises(UnimplementedError, match=rf"remora\[{extra}\] is not installed") as caught:
        backend_for(model_format)
    assert f"install remora[{extra}]" in str(caught.value.fix)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'exe'"):
        backend_for("exe")


def test_a_model_says_what_it_takes_and_computes() -> None:
    model = TfliteBackend().load(tiny_tflite.doubling((2, 3)), "auto", Limits())
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [("input", "float32", (2, 3))]
    assert model.device == "cpu"
    wanted = model.check({"input": X}, ())
    planned = model.plan({"input": X}, wanted)
    assert planned is not None
    assert planned[0].shape == (2, 3)
    np.testing.assert_array_equal(model.run({"input": X}, wanted, Stop())[0], 2 * X)
    into = [np.zeros((2, 3), np.float32)]
    assert model.run({"input": X}, wanted, Stop(), into) is into
    np.testing.assert_array_equal(into[0], 2 * X)


def test_outputs_come_in_the_order_in_which_they_were_asked_for() -> None:
    model = TfliteBackend().load(tiny_tflite.doubling((2, 3), copies=3), "cpu", Limits())
    assert model.check({"input": X}, ()) == ("output0", "output1", "output2")
    assert len(model.run({"input": X}, ("output2", "output0"), Stop())) == 2


def test_an_open_batch_takes_any_size() -> None:
    model = TfliteBackend().load(tiny_tflite.doubling((1, 3), open_batch=True), "cpu", Limits())
    assert model.inputs[0].shape == (-1, 3)
    for rows in (1, 5, 2):
        x = np.full((rows, 3), rows, np.float32)
        wanted = model.check({"input": x}, ())
        assert model.plan({"input": x}, wanted) is None
        np.testing.assert_array_equal(model.run({"input": x}, wanted, Stop())[0], 2 * x)


def test_many_threads_share_a_model_without_mixing_their_answers() -> None:
    model = TfliteBackend().load(tiny_tflite.doubling((64, 64)), "cpu", Limits())
    wrong: list[int] = []

    def use(number: int) -> None:
        x = np.full((64, 64), number, np.float32)
        for _ in range(50):
            if not (model.run({"input": x}, ("output",), Stop())[0] == 2 * number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_inputs_and_stopped_runs_are_refused_in_the_words_of_all_backends() -> None:
    model = TfliteBackend().load(tiny_tflite.doubling((2, 3)), "cpu", Limits())
    with pytest.raises(InvalidArgumentError, match="input 'input' is missing"):
        model.check({}, ())
    with pytest.raises(InvalidArgumentError, match=r"float64\[2, 3\]"):
        model.check({"input": X.astype(np.float64)}, ())
    with pytest.raises(InvalidArgumentError, match="no output named 'z'"):
        model.check({"input": X}, ("z",))
    stop = Stop()
    stop.request()
    with pytest.raises(CancelledError):
        model.run({"input": X}, ("output",), stop)


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x1c\0\0\0TFL3" + bytes(60)])
def test_a_file_that_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"TensorFlow Lite model|LiteRT cannot load"):
        TfliteBackend().load(data, "cpu", Limits())


def test_a_file_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(InvalidArgumentError, match="64 are allowed"):
        TfliteBackend().load(tiny_tflite.doubling((2, 3)), "cpu", Limits(model_bytes=64))
