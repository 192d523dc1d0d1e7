"""A REST request for inference, read: JSON with numbers in it, JSON with the tensors' bytes behind it, or both.

Everything is checked before it is used: lengths that do not add up, lists where numbers belong, names that are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora.agent import operations
from remora.agent.doors import oip_values
from remora.agent.web.exchange import Exchange
from remora.agent.web.http1_head import header_number
from remora.errors import InvalidArgumentError, UnimplementedError
from remora.workers.contract import TensorView

_TENSORS_AT = "inference-header-content-length"


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a body said."""

    id: str | None
    inputs: tuple[TensorView, ...]
    outputs: tuple[str, ...]
    #: Per output that was named: whether its bytes are wanted; the default for others.
    binary: Mapping[str, bool]
    binary_default: bool
    timeout_s: float | None

    def wants_binary(self, output: str) -> bool:
        return self.binary.get(output, self.binary_default)


def read_request(exchange: Exchange, json_bytes: int) -> InferRequest:
    """Read a request; tensors sent as binary data are slices of its body.

    Raises:
        RemoraError: what is wrong with it.
    """
    body = exchange.body
    tensors_at = header_number(exchange.headers, _TENSORS_AT)
    if tensors_at is None:
        tensors_at = len(body)
    elif tensors_at == 0:
        raise UnimplementedError(
            f"raw requests ({_TENSORS_AT}: 0) are not offered", fix="describe the tensors in JSON before their bytes"
        )
    elif tensors_at > len(body):
        raise InvalidArgumentError(f"{_TENSORS_AT} is {tensors_at}, which is more than the body's {len(body)} bytes")
    document = oip_values.parse_json(body[:tensors_at], json_bytes)
    name = document.get("id")
    if name is not None and (not isinstance(name, str) or len(name) > operations.MAX_NAME):
        raise InvalidArgumentError(f"`id` is not a text of at most {operations.MAX_NAME} characters")
    parameters = _parameters(document, "the request")
    outputs, binary = _outputs(document)
    return InferRequest(
        id=name,
        inputs=_inputs(document, body[tensors_at:]),
        outputs=outputs,
        binary=binary,
        binary_default=_flag(parameters, "binary_data_output", default=False),
        timeout_s=oip_values.timeout_of(parameters),
    )


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = document.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InvalidArgumentError(f"`{key}` is not a list of objects")
    operations.check_tensor_count(len(values))
    return values


def _parameters(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or any(isinstance(entry, list | dict) for entry in parameters.values()):
        raise InvalidArgumentError(f"the parameters of {where} are not an object of texts, numbers and true or false")
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"the parameter {key} is not true or false")
    return value


def _name(value: Mapping[str, Any], what: str) -> str:
    name = value.get("name")
    if not isinstance(name, str) or not name or len(name) > operations.MAX_NAME:
        raise InvalidArgumentError(f"an {what} has no `name` of at most {operations.MAX_NAME} characters")
    return name


def _outputs(document: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, bool]]:
    names, binary = [], {}
    for value in _objects(document, "outputs") if document.get("outputs") is not None else []:
        name = _name(value, "output")
        parameters = _parameters(value, f"output {name!r}")
        oip_values.refuse_shared_memory(name, parameters)
        oip_values.refuse_classification(name, parameters)
        names.append(name)
        if "binary_data" in parameters:
            binary[name] = _flag(parameters, "binary_data", default=False)
    return tuple(names), binary


def _shape(value: Mapping[str, Any], name: str) -> list[int]:
    shape = value.get("shape")
    if not isinstance(shape, list) or not set(map(type, shape)) <= {int}:
        raise InvalidArgumentError(f"the `shape` of input {name!r} is not a list of whole numbers")
    oip_values.check_shape(name, shape)
    return shape


def _inputs(document: Mapping[str, Any], tensors: memoryview) -> tuple[TensorView, ...]:
    inputs: list[TensorView] = []
    position = 0
    for value in _objects(document, "inputs"):
        name = _name(value, "input")
        shape = _shape(value, name)
        datatype = value.get("datatype")
        if not isinstance(datatype, str):
            raise InvalidArgumentError(f"input {name!r} has no `datatype`")
        dtype = oip_values.dtype_of(name, datatype)
        parameters = _parameters(value, f"input {name!r}")
        oip_values.refuse_shared_memory(name, parameters)
        size = parameters.get("binary_data_size")
        data: bytes | memoryview
        if size is None:
            data = oip_values.pack(name, datatype, shape, value.get("data"))
        else:
            if value.get("data") is not None:
                raise InvalidArgumentError(f"input {name!r} has both `data` and `binary_data_size`")
            if type(size) is not int or not 0 <= size <= len(tensors) - position:
                raise InvalidArgumentError(
                    f"the binary_data_size of input {name!r} is {str(size)[:40]}, "
                    f"{len(tensors) - position} bytes are left in the body"
                )
            data = tensors[position : position + size]
            position += size
        inputs.append(operations.tensor(name, dtype, shape, data))
    if position != len(tensors):
        raise InvalidArgumentError(
            f"{len(tensors)} bytes follow the JSON, its inputs describe {position} (binary_data_size)"
        )
    return tuple(inputs)
