"""TensorFlow.js graph models as ONNX, without TensorFlow.

A graph model is a JSON file with TensorFlow's own nodes and a file of weights. Only the operators of the models that
have recipes are known; another one is named. Pictures stay NHWC as the model has them: convolutions are wrapped in
transpositions, which ONNX Runtime moves together and removes.

Formats: the `graph-model` of tfjs-converter; operators of TensorFlow's core (tensorflow/core/ops).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from remora.catalog.graphs import Array, GraphBuilder
from remora.errors import InvalidArgumentError

_STORED = {"float32": "<f4", "int32": "<i4", "bool": "?", "float16": "<f2", "uint8": "<u1", "uint16": "<u2"}
_TYPES = {
    "DT_FLOAT": onnx.TensorProto.FLOAT,
    "DT_INT32": onnx.TensorProto.INT32,
    "DT_BOOL": onnx.TensorProto.BOOL,
}
_RENAMED = {
    "Add": "Add",
    "AddV2": "Add",
    "Mul": "Mul",
    "Sub": "Sub",
    "RealDiv": "Div",
    "Relu": "Relu",
    "Sigmoid": "Sigmoid",
    "Sqrt": "Sqrt",
    "Equal": "Equal",
    "Identity": "Identity",
    # Of non-negative integers only (positions in a picture), where ONNX's truncation is TensorFlow's floor.
    "FloorDiv": "Div",
    "FloorMod": "Mod",
}
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def read_weights(manifest: list[Mapping[str, Any]], data: bytes) -> dict[str, Array]:
    """Return the named arrays of a `weightsManifest` whose files are `data`, one after the other.

    Raises:
        InvalidArgumentError: the data is shorter or longer than the manifest says, or has an unknown type.
    """
    arrays: dict[str, Array] = {}
    offset = 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        quantization = entry.get("quantization", {})
        stored = _STORED.get(quantization.get("dtype", entry["dtype"]))
        if stored is None or entry["dtype"] not in _STORED:
            raise InvalidArgumentError(f"weight {entry['name']} has type {entry['dtype']}, which is not known here")
        count = math.prod(entry["shape"])
        size = count * np.dtype(stored).itemsize
        if offset + size > len(data):
            raise InvalidArgumentError(f"weight {entry['name']} ends outside the weight file")
        values = np.frombuffer(data, stored, count, offset).reshape(entry["shape"])
        offset += size
        if "scale" in quantization:
            values = values.astype(np.float64) * quantization["scale"] + quantization["min"]
        arrays[entry["name"]] = values.astype(_STORED[entry["dtype"]])
    if offset != len(data):
        raise InvalidArgumentError(f"the weight file has {len(data)} bytes, its manifest describes {offset}")
    return arrays


def convert(
    name: str, model_json: bytes, weights: bytes, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> bytes:
    """Return the ONNX file of a graph model, cut to what the named outputs need.

    Args:
        inputs, outputs: The model's own names to those that the ONNX model is to have.

    Raises:
        InvalidArgumentError: it is no graph model, has no such node, or uses an operator that is not known here.
    """
    try:
        description = json.loads(model_json)
        nodes = {node["name"]: node for node in description["modelTopology"]["node"]}
        constants = read_weights(description["weightsManifest"], weights)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"the model of {name} is no TensorFlow.js graph model: {error!r}") from error
    converter = _Converter(GraphBuilder(), nodes, constants, inputs)
    for output, renamed in outputs.items():
        converter.graph.node("Identity", [converter.value(output)], renamed)
    signature = description["signature"]["outputs"].values()
    shapes = {entry["name"].partition(":")[0]: entry for entry in signature}
    specs = [_value_info(renamed, shapes[own]["dtype"], shapes[own]["tensorShape"]) for own, renamed in outputs.items()]
    return converter.graph.model(name, converter.inputs, specs)


def _value_info(name: str, dtype: str, shape: Mapping[str, Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[dtype], [int(dim["size"]) for dim in shape.get("dim", [])])


class _Converter:
    """Converts the nodes that are asked for, and those before them, each once."""

    def __init__(
        self,
        graph: GraphBuilder,
        nodes: Mapping[str, Mapping[str, Any]],
        constants: Mapping[str, Array],
        inputs: Mapping[str, str],
    ) -> None:
        self.graph = graph
        self.inputs: list[onnx.ValueInfoProto] = []
        self._nodes = nodes
        self._constants = constants
        self._renamed = inputs
        self._done: dict[str, tuple[str, ...]] = {}
        self._operators: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
            **dict.fromkeys(("Conv2D", "_FusedConv2D"), self._convolution),
            **dict.fromkeys(("DepthwiseConv2dNative", "FusedDepthwiseConv2dNative"), self._convolution),
            "ArgMax": self._argmax,
            "Cast": self._cast,
            "ConcatV2": self._concat,
            "ExpandDims": self._expand_dims,
            "GatherNd": self._gather_nd,
            "GatherV2": self._gather,
            "MaxPool": self._max_pool,
            "Mean": self._mean,
            "Pack": self._pack,
            "Relu6": lambda node: (self.graph.relu6(self._input(node, 0)),),
            "Reshape": self._reshape,
            "ResizeBilinear": self._resize,
            "SquaredDifference": self._squared_difference,
            "Squeeze": self._squeeze,
            "StridedSlice": self._strided_slice,
            "TopKV2": self._top_k,
            "Unpack": self._unpack,
        }

    def value(self, reference: str) -> str:
        """Return the ONNX name of `node` or `node:output`, converting what is missing.

        A loop, because the graphs are some hundred nodes deep.
        """
        name, _, index = reference.partition(":")
        if self._is_constant(name):  # only those that are asked for: kernels are stored in another order
            return self.graph.constant(self._constants[name])
        pending = [name]
        while pending:
            current = pending[-1]
            missing = [before for before in self._before(current) if before not in self._done]
            if current in self._done or not missing:
                pending.pop()
                if current not in self._done:
                    self._done[current] = self._convert(current)
            else:
                pending.extend(missing)
        return self._done[name][int(index or 0)]

    def _before(self, name: str) -> list[str]:
        """Return the nodes that must be converted before this one."""
        node = self._nodes.get(name)
        if node is None:
            raise InvalidArgumentError(f"the graph has no node {name!r}")
        sources = [source.partition(":")[0] for source in node.get("input", ()) if not source.startswith("^")]
        return [source for source in sources if not self._is_constant(source)]

    def _is_constant(self, name: str) -> bool:
        return name in self._constants and self._nodes.get(name, {}).get("op") == "Const"

    def _convert(self, name: str) -> tuple[str, ...]:
        node = self._nodes[name]
        kind = node["op"]
        if kind == "Placeholder":
            renamed = self._renamed.get(name, name)
            attributes = node["attr"]
            self.inputs.append(_value_info(renamed, attributes["dtype"]["type"], attributes["shape"]["shape"]))
            return (renamed,)
        if kind in _RENAMED:
            sources = [self.value(source) for source in node["input"]]
            return (self.graph.node(_RENAMED[kind], sources),)
        operator = self._operators.get(kind)
        if operator is None:
            raise InvalidArgumentError(f"operator {kind} (node {name}) is not known here")
        return operator(node)

    # -- what operators have in common ------------------------------------------------------------------------------

    def _input(self, node: Mapping[str, Any], index: int) -> str:
        return self.value(node["input"][index])

    def _fixed(self, node: Mapping[str, Any], index: int) -> Array:
        """Return an input that must be a constant: an axis, a size, a kernel."""
        name = node["input"][index].partition(":")[0]
        while self._nodes[name]["op"] == "Identity":
            name = self._nodes[name]["input"][0].partition(":")[0]
        if name not in self._constants:
            raise InvalidArgumentError(f"input {index} of {node['op']} {node['name']} is not a constant")
        return self._constants[name]

    def _axis(self, node: Mapping[str, Any], index: int) -> int:
        return int(self._fixed(node, index).reshape(-1)[0])

    def _int64(self, value: str) -> str:
        return self.graph.node("Cast", [value], to=onnx.TensorProto.INT64)

    def _int32(self, value: str) -> str:
        """TensorFlow's positions are int32, ONNX's int64."""
        return self.graph.node("Cast", [value], to=onnx.TensorProto.INT32)

    def _in_nchw(self, value: str, work: Callable[[str], str]) -> str:
        planes = self.graph.node("Transpose", [value], perm=_TO_NCHW)
        return self.graph.node("Transpose", [work(planes)], perm=_TO_NHWC)

    # -- operators, in the order of the table -----------------------------------------------------------------------

    def _convolution(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        kernel = self._fixed(node, 1)  # height, width, channels in, channels out (depthwise: multiplier)
        groups = 1
        if "Depthwise" in node["op"]:
            height, width, groups, multiplier = kernel.shape
            kernel = kernel.transpose(2, 3, 0, 1).reshape(groups * multiplier, 1, height, width)
        else:
            kernel = kernel.transpose(3, 2, 0, 1)
        fused = [base64.b64decode(part).decode() for part in _list(node, "fused_ops", "s")]
        tensors = [self.graph.constant(kernel)]
        if "BiasAdd" in fused:
            tensors.append(self.graph.constant(self._fixed(node, 2)))
        attributes: dict[str, Any] = {
            "kernel_shape": list(kernel.shape[2:]),
            "strides": _spatial(node, "strides"),
            "dilations": _spatial(node, "dilations"),
            "group": groups,
            "auto_pad": _padding(node),
        }
        result = self._in_nchw(
            self._input(node, 0), lambda planes: self.graph.node("Conv", [planes, *tensors], **attributes)
        )
        for part in fused:
            if part == "Relu":
                result = self.graph.node("Relu", [result])
            elif part == "Relu6":
                result = self.graph.relu6(result)
            elif part != "BiasAdd":
                raise InvalidArgumentError(f"{node['name']} is fused with {part}, which is not known here")
        return (result,)

    def _argmax(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        best = self.graph.node("ArgMax", [self._input(node, 0)], axis=self._axis(node, 1), keepdims=0)
        return (self._int32(best),)

    def _cast(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        return (self.graph.node("Cast", [self._input(node, 0)], to=_TYPES[node["attr"]["DstT"]["type"]]),)

    def _concat(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        parts = [self.value(source) for source in node["input"][:-1]]
        return (self.graph.node("Concat", parts, axis=self._axis(node, len(parts))),)

    def _expand_dims(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        return (self.graph.unsqueeze(self._input(node, 0), self._axis(node, 1)),)

    def _gather_nd(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        return (self.graph.node("GatherND", [self._input(node, 0), self._int64(self._input(node, 1))]),)

    def _gather(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        sources = [self._input(node, 0), self._input(node, 1)]
        return (self.graph.node("Gather", sources, axis=self._axis(node, 2)),)

    def _max_pool(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        attributes: dict[str, Any] = {
            "kernel_shape": _spatial(node, "ksize"),
            "strides": _spatial(node, "strides"),
            "auto_pad": _padding(node),
        }
        pooled = self._in_nchw(self._input(node, 0), lambda planes: self.graph.node("MaxPool", [planes], **attributes))
        return (pooled,)

    def _mean(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        axes = [int(axis) for axis in self._fixed(node, 1).reshape(-1)]
        keep = int(node["attr"].get("keep_dims", {}).get("b", False))
        return (self.graph.node("ReduceMean", [self._input(node, 0)], axes=axes, keepdims=keep),)

    def _pack(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        axis = int(node["attr"]["axis"]["i"])
        parts = [self.graph.unsqueeze(self.value(source), axis) for source in node["input"]]
        return (self.graph.node("Concat", parts, axis=axis),)

    def _reshape(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        shape = self._int64(self._input(node, 1))
        return (self.graph.node("Reshape", [self._input(node, 0), shape]),)

    def _resize(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        attributes = node["attr"]
        mode = "asymmetric"
        if attributes.get("align_corners", {}).get("b"):
            mode = "align_corners"
        elif attributes.get("half_pixel_centers", {}).get("b"):
            mode = "half_pixel"
        size = self._fixed(node, 1)
        return (self._in_nchw(self._input(node, 0), lambda planes: self.graph.resize(planes, size, mode)),)

    def _squared_difference(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        difference = self.graph.node("Sub", [self._input(node, 0), self._input(node, 1)])
        return (self.graph.node("Mul", [difference, difference]),)

    def _squeeze(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        axes = np.asarray([int(axis) for axis in _list(node, "squeeze_dims", "i")], np.int64)
        return (self.graph.node("Squeeze", [self._input(node, 0), self.graph.constant(axes)]),)

    def _strided_slice(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        begin, end, strides = (self._fixed(node, index).astype(np.int64) for index in (1, 2, 3))
        masks = {key: int(node["attr"].get(f"{key}_mask", {}).get("i", 0)) for key in _MASKS}
        if masks["ellipsis"] or masks["new_axis"] or (strides != 1).any():
            raise InvalidArgumentError(f"the slice {node['name']} is of a kind that is not known here")
        axes = np.arange(len(begin), dtype=np.int64)
        shrunk = axes[[bool(masks["shrink_axis"] >> axis & 1) for axis in axes]]
        for axis in axes:
            if masks["begin"] >> int(axis) & 1:
                begin[axis] = 0
            if axis in shrunk:
                end[axis] = begin[axis] + 1 if begin[axis] != -1 else np.iinfo(np.int64).max
            elif masks["end"] >> int(axis) & 1:
                end[axis] = np.iinfo(np.int64).max
        bounds = [self.graph.constant(part) for part in (begin, end, axes)]
        result = self.graph.node("Slice", [self._input(node, 0), *bounds])
        if len(shrunk):
            result = self.graph.node("Squeeze", [result, self.graph.constant(shrunk)])
        return (result,)

    def _top_k(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        count = self.graph.constant(self._fixed(node, 1).reshape(1).astype(np.int64))
        values, indices = self.graph.nodes_out("TopK", [self._input(node, 0), count], 2, axis=-1)
        return values, self._int32(indices)

    def _unpack(self, node: Mapping[str, Any]) -> tuple[str, ...]:
        axis, count = int(node["attr"]["axis"]["i"]), int(node["attr"]["num"]["i"])
        parts = self.graph.nodes_out("Split", [self._input(node, 0)], count, axis=axis)
        one = self.graph.constant(np.asarray([axis], np.int64))
        return tuple(self.graph.node("Squeeze", [part, one]) for part in parts)


_MASKS = ("begin", "end", "ellipsis", "new_axis", "shrink_axis")


def _list(node: Mapping[str, Any], key: str, kind: str) -> list[Any]:
    values: list[Any] = node["attr"].get(key, {}).get("list", {}).get(kind, [])
    return values


def _spatial(node: Mapping[str, Any], key: str) -> list[int]:
    """Return height and width of an attribute that counts N, H, W, C."""
    values = _list(node, key, "i") or [1, 1, 1, 1]
    return [int(values[1]), int(values[2])]


def _padding(node: Mapping[str, Any]) -> str:
    given = base64.b64decode(node["attr"]["padding"]["s"]).decode()
    if given not in ("SAME", "VALID"):
        raise InvalidArgumentError(f"{node['name']} has padding {given}, which is not known here")
    return "SAME_UPPER" if given == "SAME" else "VALID"
