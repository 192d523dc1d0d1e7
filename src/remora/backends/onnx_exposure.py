"""Which tensors of an ONNX model may lie in memory that a client can write to while the model runs.

Kernels read their inputs more than once: an index is checked, then used; a sort compares the same numbers again and
runs off its array if they changed. So an input may be exposed only if it is floating point and all that reads it are
operators that do nothing with numbers but multiply and add them. The list is short because ONNX Runtime rewrites
graphs: an operator that it may drop (Identity, Cast, Add of zero) or move (Transpose) does not shield what stands
behind it. An output may be exposed if it is floating point and no node reads it: kernels read back what they have
written only to add to it.
"""

from __future__ import annotations

from typing import Any

import onnx

from remora.backends.contract import Exposure

_ARITHMETIC = frozenset({"Conv", "Gemm", "MatMul"})
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})


def exposure(model: Any) -> Exposure:
    """Return what may be exposed of a parsed model (`onnx.ModelProto`, which has no types)."""
    if model.functions:
        return Exposure()  # one may have the name of an operator, and do something else
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return Exposure()  # a nested graph reads names of the outer one
    outputs = frozenset(_floats(graph.output) - readers.keys())

    def is_arithmetic(node: Any) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        copies = node.op_type == "Identity" and outputs.issuperset(node.output)
        return copies or node.op_type in _ARITHMETIC

    inputs = (name for name in _floats(graph.input) if all(map(is_arithmetic, readers.get(name, ()))))
    return Exposure(inputs=frozenset(inputs) - {value.name for value in graph.output}, outputs=outputs)


def _floats(values: Any) -> set[str]:
    return {value.name for value in values if value.type.tensor_type.elem_type in _FLOATS}
