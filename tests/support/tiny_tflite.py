"""TensorFlow Lite models of one operation, written down with the format's own schema."""

from __future__ import annotations

from collections.abc import Sequence

import flatbuffers
from ai_edge_litert import schema_py_generated as schema


def doubling(shape: Sequence[int], *, open_batch: bool = False, copies: int = 1) -> bytes:
    """Return a model that adds its float32 input `input` to itself: `output`, or `output0`, ... of several."""
    model = schema.ModelT()
    model.version = 3
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    model.operatorCodes = [code]
    model.buffers = [schema.BufferT()]
    graph = schema.SubGraphT()
    names = ["input", *(["output"] if copies == 1 else [f"output{index}" for index in range(copies)])]
    graph.tensors, graph.operators = [], []
    for name in names:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), schema.TensorType.FLOAT32, 0
        if open_batch:
            tensor.shapeSignature = [-1, *shape[1:]]
        graph.tensors.append(tensor)
    for index in range(copies):
        add = schema.OperatorT()
        add.opcodeIndex, add.inputs, add.outputs = 0, [0, 0], [1 + index]
        add.builtinOptionsType = schema.BuiltinOptions.AddOptions
        add.builtinOptions = schema.AddOptionsT()
        graph.operators.append(add)
    graph.inputs, graph.outputs = [0], list(range(1, 1 + copies))
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
