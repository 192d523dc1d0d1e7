"""What a model's file is, whether a tenant may run it, and whether it is what its manifest declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from remora.agent.rules import Terms
from remora.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError, RemoraError
from remora.workers.contract import ModelSource, ModelSpec, TensorSpec

TORCHSCRIPT = "torchscript"
FORMATS = ("onnx", "tflite", TORCHSCRIPT)


def recognise(path: Path) -> str:
    """Return the format of a model file by its first bytes.

    ONNX has no magic number: it is what is left when the others are excluded; its worker checks the rest.

    Raises:
        InvalidArgumentError: the file is no model.
    """
    with path.open("rb") as stream:
        head = stream.read(8)
    if head[:4] == b"PK\x03\x04":
        return TORCHSCRIPT
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[:4] in (b"\x7fELF", b"\x89PNG") or head[:3] in (b"\xff\xd8\xff", b"\x1f\x8b\x08"):
        raise InvalidArgumentError("the model file is no model", fix=f"give one of the formats {', '.join(FORMATS)}")
    return "onnx"


def check_program(source: ModelSource, terms: Terms) -> None:
    """Refuse a file that is a program unless policy lets the tenant run it as it would a library."""
    if source.format != TORCHSCRIPT:
        return
    if not terms.values["exec"]:
        raise PermissionDeniedError(
            f"the model is TorchScript, which is a program, and none of this tenant's is run ({terms.rule('exec')})",
            fix="export the model to ONNX, or ask the operator for exec = true, or for a manifest in the catalogue",
        )
    terms.check("libraries", source.digest)


def as_declared(source: ModelSource, outcome: ModelSpec | RemoraError) -> ModelSpec | RemoraError:
    """Return the outcome of a load, or what is wrong with the manifest: guests relied on what it declares.

    Types and sizes that the file does not say (TorchScript's) are the declared ones.
    """
    if isinstance(outcome, RemoraError):
        return outcome
    inputs, outputs = _filled(outcome.inputs, source.inputs), _filled(outcome.outputs, source.outputs)
    outcome = replace(outcome, inputs=inputs, outputs=outputs)
    for kind, declared, real in (
        ("inputs", source.inputs, outcome.inputs),
        ("outputs", source.outputs, outcome.outputs),
    ):
        if declared and declared != real:
            found = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in real)
            return FailedPreconditionError(
                f"the {kind} of model {source.key!r} are not those that its manifest declares",
                fix=f"correct [[{kind}]] in its manifest: {found}",
            )
    return outcome


def _filled(real: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    known = {spec.name: spec for spec in declared}
    return tuple(spec if spec.dtype else known.get(spec.name, spec) for spec in real)
