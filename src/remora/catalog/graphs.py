"""Collects the nodes and tensors of an ONNX graph; the same calls make the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 17
IR_VERSION = 8
Array = np.ndarray[Any, np.dtype[Any]]


def serialize(graph: onnx.GraphProto) -> bytes:
    """Return the file of a graph, checked."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="remora")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


class GraphBuilder:
    """Names values by counting; equal constants are stored once."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:  # ONNX's own values
        """Add a node and return the name of its only output."""
        output = output or f"n{len(self._nodes)}"
        self._add(kind, inputs, [output], attributes)
        return output

    def nodes_out(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        outputs = [f"n{len(self._nodes)}_{index}" for index in range(count)]
        self._add(kind, inputs, outputs, attributes)
        return outputs

    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any]) -> None:
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, **attributes))

    def constant(self, array: Array) -> str:
        # np.ascontiguousarray would turn a scalar, such as a bound of Clip, into shape [1].
        array = np.asarray(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        name = self._constants.get(key)
        if name is None:
            name = self._constants[key] = f"c{len(self._tensors)}"
            self._tensors.append(numpy_helper.from_array(array, name))
        return name

    def relu6(self, value: str) -> str:
        bounds = [self.constant(np.asarray(bound, np.float32)) for bound in (0.0, 6.0)]
        return self.node("Clip", [value, *bounds])

    def unsqueeze(self, value: str, axis: int) -> str:
        return self.node("Unsqueeze", [value, self.constant(np.asarray([axis], np.int64))])

    def resize(self, planes: str, size: Array, mode: str) -> str:
        """Resize NCHW planes to (height, width) by linear interpolation."""
        kept = self.node("Shape", [planes], start=0, end=2)
        sizes = self.node("Concat", [kept, self.constant(size.astype(np.int64))], axis=0)
        return self.node("Resize", [planes, "", "", sizes], mode="linear", coordinate_transformation_mode=mode)

    def model(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> bytes:
        """Return the model's file."""
        return serialize(helper.make_graph(self._nodes, name, list(inputs), list(outputs), self._tensors))
