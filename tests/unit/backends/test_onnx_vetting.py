"""A model file that a guest uploads is refused unless it is self-contained and only computes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from remora.backends.contract import Limits
from remora.backends.onnx import OnnxBackend, vet
from remora.errors import InvalidArgumentError

OPSET = [helper.make_opsetid("", 17)]


def external(name: str = "w") -> onnx.TensorProto:
    """Return a tensor that lies in a file of the current directory."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "secret.bin"
    return tensor


def values(*names: str) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in names]


def model_of(nodes: list[onnx.NodeProto], *, tensors: Any = (), opsets: Any = OPSET, **extra: Any) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", values("x"), values("y"), list(tensors))
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **extra)


def with_initializer() -> onnx.ModelProto:
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], tensors=[external()])


def with_attribute() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=external())
    return model_of([constant, helper.make_node("Add", ["x", "w"], ["y"])])


def with_subgraph() -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "branch", [], values("z"), initializer=[external()]
    )
    condition = numpy_helper.from_array(np.asarray(True), "c")
    return model_of([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], tensors=[condition])


def with_function() -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=external()), helper.make_node("Add", ["a", "w"], ["b"])]
    function = helper.make_function("local", "F", ["a"], ["b"], body, OPSET)
    opsets = [*OPSET, helper.make_opsetid("local", 1)]
    return model_of([helper.make_node("F", ["x"], ["y"], domain="local")], opsets=opsets, functions=[function])


def with_sparse_initializer() -> onnx.ModelProto:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])])
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external())
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4), "i"))
    sparse.dims.append(4)
    return model


def with_sparse_attribute() -> onnx.ModelProto:
    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(external())
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    return model_of([constant, helper.make_node("Add", ["x", "w"], ["y"])])


@pytest.mark.parametrize(
    "make",
    [
        with_initializer,
        with_attribute,
        with_subgraph,
        with_function,
        with_sparse_initializer,
        with_sparse_attribute,
    ],
    ids=lambda make: make.__name__,
)
def test_data_outside_the_file_is_refused_wherever_it_is_named(make: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="outside the model file"):
        vet(make().SerializeToString(), Limits())


def test_an_unknown_operator_domain_is_refused() -> None:
    opsets = [*OPSET, helper.make_opsetid("ai.onnx.contrib", 1)]
    model = model_of([helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib")], opsets=opsets)
    with pytest.raises(InvalidArgumentError, match=r"ai\.onnx\.contrib"):
        vet(model.SerializeToString(), Limits())


def test_an_operator_of_a_domain_that_is_not_imported_is_refused() -> None:
    model = model_of([helper.make_node("Evil", ["x"], ["y"], domain="com.example")])
    with pytest.raises(InvalidArgumentError, match=r"com\.example\.Evil"):
        vet(model.SerializeToString(), Limits())


@pytest.mark.parametrize("data", [b"", b"not a model at all", os.urandom(4096), b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_bytes_that_are_no_model_are_refused_with_the_fix(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="not an ONNX model") as caught:
        vet(data, Limits())
    assert caught.value.fix == "upload a .onnx file"


def test_a_file_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidArgumentError, match="10 are allowed"):
        vet(b"x" * 11, Limits(model_bytes=10))


def test_too_many_nodes_are_refused() -> None:
    nodes = [helper.make_node("Identity", ["x"], [f"n{number}"]) for number in range(12)]
    with pytest.raises(InvalidArgumentError, match="more than 10 nodes"):
        vet(model_of(nodes).SerializeToString(), Limits(nodes=10))


def test_graphs_nested_without_end_are_refused() -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "leaf", [], values("z"))
    for _ in range(20):
        node = helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "level", [], values("z"))
        del graph.node[0].attribute[1]  # one branch is enough, and does not double the size
    model = helper.make_model(graph, opset_imports=OPSET)
    with pytest.raises(InvalidArgumentError, match="deep"):
        vet(model.SerializeToString(), Limits())


def test_a_model_that_onnx_runtime_cannot_load_is_a_clear_error() -> None:
    model = model_of([helper.make_node("NoSuchOperator", ["x"], ["y"])])
    with pytest.raises(InvalidArgumentError, match="cannot load the model"):
        OnnxBackend().load(model.SerializeToString(), "cpu", Limits())


def test_a_model_with_strings_is_refused() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    model = helper.make_model(graph, opset_imports=OPSET, ir_version=8)
    with pytest.raises(InvalidArgumentError, match="string"):
        OnnxBackend().load(model.SerializeToString(), "cpu", Limits())
