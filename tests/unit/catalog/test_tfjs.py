"""TensorFlow.js graph models become ONNX models that compute the same, or are refused by the operator's name."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from remora.backends.contract import Array, Limits, Stop
from remora.backends.onnx import OnnxBackend
from remora.catalog.tfjs import convert, read_weights
from remora.errors import InvalidArgumentError

FLOAT, INT = {"type": "DT_FLOAT"}, {"type": "DT_INT32"}
RNG = np.random.default_rng(3)
PICTURE = RNG.random((1, 5, 6, 2), np.float32)


def text(value: str) -> dict[str, str]:
    return {"s": base64.b64encode(value.encode()).decode()}


def ints(*values: int) -> dict[str, Any]:
    return {"list": {"i": [str(value) for value in values]}}


class Graph:
    """A graph model in the making: one input `x`, and whatever is added."""

    def __init__(self, x: Array) -> None:
        self.x = x
        dims = {"dim": [{"size": str(size)} for size in x.shape]}
        attr = {"dtype": FLOAT if x.dtype == np.float32 else INT, "shape": {"shape": dims}}
        self.nodes: list[dict[str, Any]] = [{"name": "x", "op": "Placeholder", "attr": attr}]
        self.weights: list[dict[str, Any]] = []
        self.data = b""

    def const(self, name: str, array: Any, kind: str = "int32", **quantization: Any) -> str:
        self.nodes.append({"name": name, "op": "Const", "attr": {}})
        array = np.asarray(array)
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": kind}
        if quantization:
            entry["quantization"] = quantization
        self.weights.append(entry)
        self.data += array.astype({"float16": "<f2", "uint8": "u1"}.get(quantization.get("dtype", ""), kind)).tobytes()
        return name

    def add(self, op: str, *inputs: str, name: str = "", **attr: Any) -> str:
        name = name or f"node{len(self.nodes)}"
        self.nodes.insert(0, {"name": name, "op": op, "input": list(inputs), "attr": attr})  # in no useful order
        return name

    def run(self, output: str, shape: tuple[int, ...], dtype: Mapping[str, str] = FLOAT) -> Array:
        signature = {"name": f"{output}:0", "dtype": dtype["type"]}
        signature |= {"tensorShape": {"dim": [{"size": str(size)} for size in shape]}}  # type: ignore[dict-item]
        model = {
            "modelTopology": {"node": self.nodes},
            "weightsManifest": [{"paths": ["w.bin"], "weights": self.weights}],
            "signature": {"outputs": {"y": signature}},
        }
        data = convert("graph", json.dumps(model).encode(), self.data, {"x": "in"}, {output: "out"})
        loaded = OnnxBackend().load(data, "cpu", Limits())
        return loaded.run({"in": self.x}, ("out",), Stop())[0]


def padded(x: Array, kernel: int, stride: int) -> Array:
    """Pad height and width as TensorFlow's SAME does."""
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, [(0, 0), *pads, (0, 0)])


def convolved(x: Array, kernel: Array, stride: int, *, depthwise: bool = False) -> Array:
    side = kernel.shape[0]
    x = padded(x, side, stride)
    rows, columns = (x.shape[1] - side) // stride + 1, (x.shape[2] - side) // stride + 1
    out = []
    for row in range(rows):
        for column in range(columns):
            patch = x[0, row * stride : row * stride + side, column * stride : column * stride + side]
            if depthwise:
                out.append((patch[..., np.newaxis] * kernel).sum(axis=(0, 1)).reshape(-1))
            else:
                out.append(np.tensordot(patch, kernel, 3))
    return np.array(out).reshape(1, rows, columns, -1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_fused_convolution_pads_and_orders_as_tensorflow_does(stride: int) -> None:
    graph = Graph(PICTURE)
    kernel, bias = RNG.standard_normal((3, 3, 2, 4)), np.array([-1, 0, 1, 9])
    graph.const("k", kernel, "float32")
    graph.const("b", bias, "float32")
    fused = {"list": {"s": [text("BiasAdd")["s"], text("Relu6")["s"]]}}
    attributes: dict[str, Any] = {
        "strides": ints(1, stride, stride, 1),
        "dilations": ints(1, 1, 1, 1),
        "padding": text("SAME"),
    }
    y = graph.add("_FusedConv2D", "x", "k", "b", fused_ops=fused, **attributes)
    expected = np.clip(convolved(PICTURE, kernel, stride) + bias, 0, 6)
    np.testing.assert_allclose(graph.run(y, expected.shape), expected, atol=1e-5)


def test_a_depthwise_convolution_with_a_multiplier() -> None:
    graph = Graph(PICTURE)
    kernel = RNG.standard_normal((3, 3, 2, 2))
    graph.const("k", kernel, "float32")
    y = graph.add("DepthwiseConv2dNative", "x", "k", strides=ints(1, 2, 2, 1), padding=text("SAME"))
    expected = convolved(PICTURE, kernel, 2, depthwise=True)
    np.testing.assert_allclose(graph.run(y, expected.shape), expected, atol=1e-5)


def test_positions_of_the_best_scores() -> None:
    graph = Graph(PICTURE)
    graph.const("flat", [1, 60])
    graph.const("count", 3)
    graph.const("width", 7)
    flat = graph.add("Reshape", "x", "flat")
    best = graph.add("TopKV2", flat, "count")
    row = graph.add("FloorDiv", f"{best}:1", "width")
    column = graph.add("FloorMod", f"{best}:1", "width")
    y = graph.add("Pack", row, column, axis={"i": "2"}, N={"i": "2"})
    places = np.argsort(-PICTURE.reshape(-1))[:3]
    assert graph.run(y, (1, 3, 2), INT).tolist() == [[[place // 7, place % 7] for place in places]]


def test_gathering_slicing_and_joining() -> None:
    graph = Graph(PICTURE)
    for name, value in (("begin", [0, 1, -2, 0]), ("end", [1, 9, 0, 1]), ("step", [1, 1, 1, 1]), ("axis", -1)):
        graph.const(name, value)
    sliced = graph.add("StridedSlice", "x", "begin", "end", "step", end_mask={"i": "6"}, shrink_axis_mask={"i": "8"})
    joined = graph.add("ConcatV2", sliced, sliced, "axis")
    expected = np.concatenate([PICTURE[:, 1:, -2:, 0]] * 2, axis=-1)
    np.testing.assert_array_equal(graph.run(joined, expected.shape), expected)
    graph.const("places", [[0, 3, 1], [0, 0, 0]])
    places = graph.add("GatherNd", "x", "places")
    np.testing.assert_array_equal(graph.run(places, (2, 2)), PICTURE[0, [3, 0], [1, 0]])


def test_reductions_and_arithmetic() -> None:
    graph = Graph(PICTURE)
    graph.const("axes", [1, 2])
    graph.const("zero", 0)
    mean = graph.add("Mean", "x", "axes", keep_dims={"b": True})
    apart = graph.add("SquaredDifference", "x", mean)
    y = graph.add("Squeeze", graph.add("ExpandDims", graph.add("Sqrt", apart), "zero"), squeeze_dims=ints(0))
    expected = np.abs(PICTURE - PICTURE.mean(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(graph.run(y, expected.shape), expected, atol=1e-6)


def test_resizing_by_half_pixels_and_by_corners() -> None:
    graph = Graph(np.array([0, 1], np.float32).reshape(1, 1, 2, 1))
    graph.const("size", [1, 4])
    half = graph.add("ResizeBilinear", "x", "size", half_pixel_centers={"b": True})
    assert graph.run(half, (1, 1, 4, 1)).reshape(-1).tolist() == [0, 0.25, 0.75, 1]
    plain = graph.add("ResizeBilinear", "x", "size")
    assert graph.run(plain, (1, 1, 4, 1)).reshape(-1).tolist() == [0, 0.5, 1, 1]
    corners = graph.add("ResizeBilinear", "x", "size", align_corners={"b": True})
    np.testing.assert_allclose(graph.run(corners, (1, 1, 4, 1)).reshape(-1), [0, 1 / 3, 2 / 3, 1], atol=1e-6)


def test_quantised_weights_are_expanded() -> None:
    graph = Graph(PICTURE)
    graph.const("half", [0.5, 2], "float32", dtype="float16")
    graph.const("bytes", [0, 255], "float32", dtype="uint8", scale=0.1, min=-1.0)
    arrays = read_weights([{"weights": graph.weights}], graph.data)
    assert arrays["half"].tolist() == [0.5, 2]
    np.testing.assert_allclose(arrays["bytes"], [-1, 24.5], atol=1e-6)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}


@pytest.mark.parametrize("change", [-1, 1])
def test_a_weight_file_of_another_size_is_refused(change: int) -> None:
    with pytest.raises(InvalidArgumentError, match="weight"):
        read_weights([{"weights": [{"name": "w", "shape": [4], "dtype": "int32"}]}], bytes(16 + change))


def test_what_is_not_known_is_named() -> None:
    graph = Graph(PICTURE)
    with pytest.raises(InvalidArgumentError, match="operator Erf"):
        graph.run(graph.add("Erf", "x"), PICTURE.shape)
    with pytest.raises(InvalidArgumentError, match="no node 'nothing'"):
        graph.run(graph.add("Relu", "nothing"), PICTURE.shape)
    with pytest.raises(InvalidArgumentError, match="no TensorFlow"):
        convert("graph", b"[]", b"", {}, {})
