"""The model that the measurement of batches uses is one that can be joined."""

from __future__ import annotations

import numpy as np

from remora.backends.contract import Limits, Stop
from remora.backends.onnx import OnnxBackend
from remora.bench.batching import dear_model
from remora.workers.calibration import rows_are_rows


def test_rows_of_the_dear_model_are_rows() -> None:
    model = OnnxBackend().load(dear_model(), "cpu", Limits())
    specs = [type(spec)(spec.name, spec.dtype, (1, 16)) for spec in model.inputs]
    assert rows_are_rows(model, specs, ("output",), Stop())
    (output,) = model.run({"input": np.zeros((3, 16), np.float32)}, ("output",), Stop())
    assert output.shape == (3, 16)
