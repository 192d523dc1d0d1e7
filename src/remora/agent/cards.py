"""What is known of a model and shown to callers: from the catalogue, and from the worker that loaded it."""

from __future__ import annotations

from typing import Protocol

from remora.workers.contract import ModelSource, ModelSpec, TensorSpec


class Description(Protocol):
    """What the catalogue knows of a model without loading it (`catalog.ModelMetadata`)."""

    @property
    def description(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...


class CatalogueEntry(Protocol):
    """A model of the operator's (`catalog.CatalogEntry`)."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def info(self) -> Description: ...


class ModelCard:
    """A model as `Models` and `LoadModel` show it: what is known of it now."""

    __slots__ = ("description", "digest", "inputs", "licence", "name", "outputs", "size_bytes", "spec", "task")

    def __init__(self, name: str, task: str, digest: str, size_bytes: int, spec: ModelSpec | None) -> None:
        self.name = name
        self.task = task
        self.digest = digest
        self.size_bytes = size_bytes
        self.spec = spec
        self.inputs: tuple[TensorSpec, ...] = spec.inputs if spec is not None else ()
        self.outputs: tuple[TensorSpec, ...] = spec.outputs if spec is not None else ()
        self.description = ""
        self.licence = ""
