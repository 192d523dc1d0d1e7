"""How each model is run on its device: how many rows at once, for how long one waits for company, how many runs.

An operator's word in the manifest goes first.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from remora.agent.operations import INFER, Operation
from remora.agent.tickets import ALONE, Lane, Plan
from remora.workers.contract import ModelSource, ModelSpec


def form_of(operation: Operation) -> tuple[Hashable, int]:
    """Return what requests must have in common to run as one, and how many rows this one has.

    None: it runs by itself, because it is no inference or its inputs have no first axis in common.
    """
    rows = {tensor.shape[0] if tensor.shape else 0 for tensor in operation.inputs}
    if operation.name != INFER or len(rows) != 1 or 0 in rows:
        return None, 1
    inputs = tuple((tensor.name, tensor.dtype, tensor.shape[1:]) for tensor in operation.inputs)
    return (operation.outputs, inputs), rows.pop()


def takes_rows(spec: ModelSpec) -> bool:
    """True if the first axis of every input and output is open: the form of a model that takes any number of rows."""
    return all(tensor.shape and tensor.shape[0] == -1 for tensor in (*spec.inputs, *spec.outputs))


class Tuning:
    """The plans of loaded models."""

    def __init__(self) -> None:
        self._plans: dict[Lane, Plan] = {}

    def plan(self, lane: Lane) -> Plan:
        return self._plans.get(lane, ALONE)

    def loaded(self, lane: Lane, source: ModelSource, spec: ModelSpec) -> None:
        """A model is loaded: decide how it is run."""
        said = source.manifest.get("batching", {})
        plan = ALONE
        if "concurrent" in said:
            plan = replace(plan, concurrent=int(said["concurrent"]))
        if takes_rows(spec):
            plan = replace(plan, rows=int(said.get("rows", 1)), wait_s=float(said.get("wait_ms", 0)) / 1000)
        if plan != ALONE:
            self._plans[lane] = plan

    def forget(self, lane: Lane) -> None:
        self._plans.pop(lane, None)
