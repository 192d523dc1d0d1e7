"""Which tensors may lie in memory that a client writes to: those that can only make numbers wrong."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from remora.backends.contract import Exposure
from remora.backends.onnx_exposure import exposure

OPSET = [helper.make_opsetid("", 17)]


def value(name: str, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [2, 2])


def found(*nodes: NodeProto, x: int = TensorProto.FLOAT, y: int = TensorProto.FLOAT) -> Exposure:
    graph = helper.make_graph(list(nodes), "g", [value("x", x)], [value("y", y)])
    return exposure(helper.make_model(graph, opset_imports=OPSET))


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_what_is_only_multiplied_and_added_may_be_exposed(operator: str) -> None:
    assert found(helper.make_node(operator, ["x", "x"], ["y"])) == Exposure(frozenset({"x"}), frozenset({"y"}))


def test_a_copy_into_an_output_may_be_exposed() -> None:
    assert found(helper.make_node("Identity", ["x"], ["y"])).inputs == {"x"}


def test_what_stands_behind_an_operator_that_may_be_dropped_is_looked_at_too() -> None:
    dropped = helper.make_node("Identity", ["x"], ["z"])
    assert found(dropped, helper.make_node("TopK", ["z", "k"], ["y", "i"])).inputs == set()


@pytest.mark.parametrize("operator", ["TopK", "Gather", "Transpose", "Cast", "Add", "NonMaxSuppression"])
def test_an_operator_that_looks_twice_or_may_be_moved_is_given_a_copy(operator: str) -> None:
    assert found(helper.make_node(operator, ["x", "x"], ["y"])).inputs == set()


def test_one_careful_reader_is_not_enough() -> None:
    nodes = helper.make_node("MatMul", ["x", "x"], ["y"]), helper.make_node("TopK", ["x", "k"], ["v", "i"])
    assert found(*nodes).inputs == set()


def test_whole_numbers_may_be_indices_and_are_never_exposed() -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    assert found(node, x=TensorProto.INT64, y=TensorProto.INT64) == Exposure()


def test_an_output_that_another_node_reads_is_not_exposed() -> None:
    nodes = helper.make_node("MatMul", ["x", "x"], ["y"]), helper.make_node("TopK", ["y", "k"], ["v", "i"])
    assert found(*nodes).outputs == set()


def test_a_graph_inside_a_node_or_a_function_exposes_nothing() -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [value("z")])
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.asarray(True), "c"))
    inner = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    assert found(condition, inner) == Exposure()
    function = helper.make_function(
        "", "MatMul", ["a", "b"], ["c"], [helper.make_node("TopK", ["a", "b"], ["c"])], OPSET
    )
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", [value("x")], [value("y")])
    assert exposure(helper.make_model(graph, opset_imports=OPSET, functions=[function])) == Exposure()
