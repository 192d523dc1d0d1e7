"""Builds classifiers as ONNX graphs from weights: the architectures are short enough to write down.

That spares the machine PyTorch (hundreds of MB) for a conversion that takes half a second. Batch normalisation is
folded into the convolutions in float64. The same onnx version makes the same bytes, so a manifest can pin the result's
SHA-256.

Sources of the numbers: EfficientNet-Lite (github.com/tensorflow/tpu, efficientnet lite) with TensorFlow's SAME padding;
MobileNetV2 (arXiv:1801.04381) with torchvision's tensor names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from remora.catalog.graphs import Array, serialize
from remora.errors import InvalidArgumentError

#: repeats, kernel, stride of the first block, expansion, channels out
_EFFICIENTNET_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: expansion, channels out, repeats, stride of the first block
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_SIZE = 224


class _Graph:
    """Collects nodes and initializers; tracks the spatial size, which TensorFlow's padding depends on."""

    def __init__(self, weights: Mapping[str, Array], *, eps: float, same_padding: bool) -> None:
        self._weights = weights
        self._eps = eps
        self._same = same_padding
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.size = _SIZE
        self._clip = [self._tensor("clip_min", np.asarray(0.0, np.float32))]
        self._clip.append(self._tensor("clip_max", np.asarray(6.0, np.float32)))

    def weight(self, name: str) -> Array:
        try:
            return self._weights[name]
        except KeyError as error:
            raise InvalidArgumentError(f"the weights have no tensor {name!r}") from error

    def convolution(
        self, source: str, conv: str, norm: str, *, stride: int = 1, depthwise: bool = False, relu6: bool = True
    ) -> str:
        kernel = self.weight(f"{conv}.weight").astype(np.float64)
        gamma, beta, mean, variance = (
            self.weight(f"{norm}.{part}").astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + self._eps)
        side = int(kernel.shape[2])
        name = f"n{len(self.nodes)}"
        inputs = [
            source,
            self._tensor(f"{conv}.weight", (kernel * scale[:, None, None, None]).astype(np.float32)),
            self._tensor(f"{conv}.bias", (beta - mean * scale).astype(np.float32)),
        ]
        self._node(
            "Conv",
            inputs,
            name,
            group=int(kernel.shape[0]) if depthwise else 1,
            kernel_shape=[side, side],
            pads=self._pads(side, stride),
            strides=[stride, stride],
        )
        self.size = -(-self.size // stride)
        if not relu6:
            return name
        return self._node("Clip", [name, *self._clip], f"n{len(self.nodes)}")

    def add(self, left: str, right: str) -> str:
        return self._node("Add", [left, right], f"n{len(self.nodes)}")

    def head(self, source: str, linear: str) -> None:
        pooled = self._node("GlobalAveragePool", [source], "pooled")
        embedding = self._node("Flatten", [pooled], "embedding", axis=1)
        matrix = self._tensor(f"{linear}.weight", self.weight(f"{linear}.weight").astype(np.float32))
        bias = self._tensor(f"{linear}.bias", self.weight(f"{linear}.bias").astype(np.float32))
        self._node("Gemm", [embedding, matrix, bias], "logits", transB=1)

    def model(self, name: str) -> bytes:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            name,
            [value("input", onnx.TensorProto.FLOAT, ["N", 3, _SIZE, _SIZE])],
            [
                value("logits", onnx.TensorProto.FLOAT, ["N", 1000]),
                value("embedding", onnx.TensorProto.FLOAT, ["N", 1280]),
            ],
            self.tensors,
        )
        return serialize(graph)

    def _pads(self, kernel: int, stride: int) -> list[int]:
        if not self._same:
            return [kernel // 2] * 4
        total = max((-(-self.size // stride) - 1) * stride + kernel - self.size, 0)
        before = total // 2
        return [before, before, total - before, total - before]

    def _tensor(self, name: str, array: Array) -> str:
        # np.ascontiguousarray would turn the 0-d bounds of Clip into shape [1].
        self.tensors.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:  # ONNX attribute values
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        return output


def efficientnet_lite0(weights: Mapping[str, Array]) -> bytes:
    """Return EfficientNet-Lite0: input [N, 3, 224, 224] -> logits [N, 1000] and embedding [N, 1280]."""
    graph = _Graph(weights, eps=1e-3, same_padding=True)
    x = graph.convolution("input", "_conv_stem", "_bn0", stride=2)
    channels, block = 32, 0
    for repeats, _kernel, first_stride, expand, out in _EFFICIENTNET_LITE0:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            prefix, source = f"_blocks.{block}.", x
            if expand != 1:
                x = graph.convolution(x, f"{prefix}_expand_conv", f"{prefix}_bn0")
            x = graph.convolution(x, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, depthwise=True)
            x = graph.convolution(x, f"{prefix}_project_conv", f"{prefix}_bn2", relu6=False)
            if stride == 1 and channels == out:
                x = graph.add(x, source)
            channels, block = out, block + 1
    x = graph.convolution(x, "_conv_head", "_bn1")
    graph.head(x, "_fc")
    return graph.model("efficientnet-lite0")


def mobilenet_v2(weights: Mapping[str, Array]) -> bytes:
    """Return MobileNetV2 1.0: input [N, 3, 224, 224] -> logits [N, 1000] and embedding [N, 1280]."""
    graph = _Graph(weights, eps=1e-5, same_padding=False)
    x = graph.convolution("input", "features.0.0", "features.0.1", stride=2)
    channels, block = 32, 1
    for expand, out, repeats, first_stride in _MOBILENET_V2:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            prefix, source, part = f"features.{block}.conv.", x, 0
            if expand != 1:
                x = graph.convolution(x, f"{prefix}0.0", f"{prefix}0.1")
                part = 1
            x = graph.convolution(x, f"{prefix}{part}.0", f"{prefix}{part}.1", stride=stride, depthwise=True)
            x = graph.convolution(x, f"{prefix}{part + 1}", f"{prefix}{part + 2}", relu6=False)
            if stride == 1 and channels == out:
                x = graph.add(x, source)
            channels, block = out, block + 1
    x = graph.convolution(x, "features.18.0", "features.18.1")
    graph.head(x, "classifier.1")
    return graph.model("mobilenet-v2")


def identity(_weights: Mapping[str, Array]) -> bytes:
    """Return a model that passes one float32 tensor of four dimensions through: what is left is the cost of the way."""
    value = helper.make_tensor_value_info
    dims = ["N", "C", "H", "W"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["output"], name="identity")],
        "identity",
        [value("input", onnx.TensorProto.FLOAT, dims)],
        [value("output", onnx.TensorProto.FLOAT, dims)],
    )
    return serialize(graph)


ARCHITECTURES = {"efficientnet-lite0": efficientnet_lite0, "mobilenet-v2": mobilenet_v2, "identity": identity}
