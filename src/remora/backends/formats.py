"""Which backend runs a model: its format says, and a format whose library is not installed is an error that names it.

A backend is imported when its first model comes: most nodes never see some of them, and each costs 0.1 to 2 s and tens
of MB.
"""

from __future__ import annotations

from functools import cache

from remora.backends.contract import Backend
from remora.errors import InvalidArgumentError, UnimplementedError


def _missing(name: str, extra: str) -> UnimplementedError:
    return UnimplementedError(
        f"the model is {name}, and this node has no backend for it: remora[{extra}] is not installed",
        fix=f"install remora[{extra}] on the node and restart its agent, or export the model to ONNX",
    )


@cache
def backend_for(model_format: str) -> Backend:
    """Return the backend for a format.

    Raises:
        UnimplementedError: the extra that brings its library is not installed.
        InvalidArgumentError: there is no such format.
    """
    if model_format == "onnx":
        from remora.backends.onnx import OnnxBackend

        return OnnxBackend()
    if model_format == "tflite":
        try:
            from remora.backends.tflite import TfliteBackend
        except ImportError as error:
            raise _missing("TensorFlow Lite", "tflite") from error
        return TfliteBackend()
    if model_format == "torchscript":
        try:
            from remora.backends.torch import TorchBackend
        except ImportError as error:
            raise _missing("TorchScript", "torch") from error
        return TorchBackend()
    raise InvalidArgumentError(f"there is no backend for the format {model_format!r}")
