"""A manifest says all that Remora must know of a model: one TOML file, whose every key `docs/models.md` explains.

Checked when it is read, because a wrong key found while a guest waits helps nobody. Preprocessing is checked again by
the backend that uses it; here only its form.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.errors import InvalidArgumentError, NotFoundError
from remora.wire.remora_v1 import DTYPES
from remora.workers.contract import PICTURES, TensorSpec

FILE_NAME = "manifest.toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
TASKS = (*PICTURES.values(), "tensor")
FORMATS = ("onnx", "tflite", "torchscript")
_TEXT_KEYS = ("name", "task", "description", "licence", "format", "file", "sha256", "labels", "source")
#: Of `TASKS`: the table that says what the model's answer means. All of them are for pictures.
ANSWERS = {
    "classification": "scores",
    "detection": "boxes",
    "segmentation": "map",
    "pose": "points",
    "depth": "map",
}
_TABLES = ("preprocess", *dict.fromkeys(ANSWERS.values()), "batching", "recipe")
_TENSORS = ("inputs", "outputs")


@dataclass(frozen=True)
class Manifest:
    name: str
    task: str
    file: str = "model.onnx"
    format: str = "onnx"
    sha256: str = ""  # of the file; empty: whatever lies there
    description: str = ""
    licence: str = ""
    source: str = ""
    labels: str = ""  # file with one label a line, beside the manifest
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    boxes: Mapping[str, Any] = field(default_factory=dict)
    points: Mapping[str, Any] = field(default_factory=dict)
    map: Mapping[str, Any] = field(default_factory=dict)
    #: How it is run, where the operator knows better than a measurement.
    batching: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    #: Declared, so that guests can ask before the model is loaded; compared with the model when it is.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def answer(self) -> dict[str, Mapping[str, Any]]:
        """Return the table that says what the model's answer means, by its name."""
        name = ANSWERS.get(self.task)
        return {name: getattr(self, name)} if name is not None else {}


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: names the file, the key, and what is allowed.
    """
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise NotFoundError(f"no manifest at {path}", fix="docs/models.md shows one") from error


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check the text of a manifest; `where` names it in errors."""
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{where} is not valid TOML: {error}") from error
    allowed = (*_TEXT_KEYS, *_TABLES, *_TENSORS)
    unknown = set(table) - set(allowed)
    if unknown:
        raise InvalidArgumentError(
            f"{where} has unknown keys: {', '.join(sorted(unknown))}", fix=f"allowed are {', '.join(allowed)}"
        )
    for key in _TEXT_KEYS:
        if not isinstance(table.get(key, ""), str):
            raise InvalidArgumentError(f"{where}: {key} must be a string")
    for key in _TABLES:
        if not isinstance(table.get(key, {}), dict):
            raise InvalidArgumentError(f"{where}: {key} must be a table, [{key}]")
    for key in ("name", "task"):
        if not table.get(key):
            raise InvalidArgumentError(f"{where}: {key} is missing")
    for key in _TENSORS:
        table[key] = _tensors(table.get(key, []), key, where)
    manifest = Manifest(**table)
    _check(manifest, where)
    return manifest


def _tensors(given: object, key: str, where: str) -> tuple[TensorSpec, ...]:
    """Check `[[inputs]]` or `[[outputs]]`."""
    example = f'write [[{key}]] with name = "x", dtype = "float32" and shape = [-1, 3]; -1 is any size'
    if not isinstance(given, list):
        raise InvalidArgumentError(f"{where}: {key} must be an array of tables", fix=example)
    specs = []
    for table in given:
        match table:
            case {"name": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest and dtype in DTYPES:
                if all(type(size) is int and size >= -1 for size in shape):
                    specs.append(TensorSpec(name, dtype, tuple(shape)))
                    continue
        raise InvalidArgumentError(f"{where}: {key} has {table!r}", fix=f"{example}; dtypes are {', '.join(DTYPES)}")
    return tuple(specs)


#: Key of `[batching]` -> most; each is a number from 0 (rows and threads: 1) on.
_BATCHING: dict[str, int] = {"rows": 1024, "wait_ms": 1000, "concurrent": 64, "threads": 64}


def check_batching(table: Mapping[str, Any], where: str) -> None:
    """Check `[batching]`.

    Raises:
        InvalidArgumentError: an unknown key, or a number that cannot be.
    """
    for key, value in table.items():
        if key not in _BATCHING:
            raise InvalidArgumentError(
                f"{where}: [batching] has no key {key!r}", fix=f"the keys are {', '.join(_BATCHING)}"
            )
        least = 1 if key in ("rows", "threads") else 0
        number = type(value) is int or (type(value) is float and key == "wait_ms")
        if not number or not least <= value <= _BATCHING[key]:
            raise InvalidArgumentError(
                f"{where}: [batching] {key} is {value!r}", fix=f"allowed are {least} to {_BATCHING[key]}"
            )


def _check(manifest: Manifest, where: str) -> None:
    if not _NAME.fullmatch(manifest.name):
        raise InvalidArgumentError(
            f"{where}: name {manifest.name!r} is not allowed",
            fix="use up to 63 lower-case letters, digits, dots, dashes and underscores",
        )
    for key, given, allowed in (("task", manifest.task, TASKS), ("format", manifest.format, FORMATS)):
        if given not in allowed:
            raise InvalidArgumentError(f"{where}: {key} is {given!r}", fix=f"allowed are {', '.join(allowed)}")
    for key, given in (("file", manifest.file), ("labels", manifest.labels)):
        if given and Path(given).name != given:
            raise InvalidArgumentError(f"{where}: {key} is {given!r}", fix="name a file beside the manifest")
    if manifest.sha256 and not _SHA256.fullmatch(manifest.sha256):
        raise InvalidArgumentError(f"{where}: sha256 must be 64 hex digits")
    check_batching(manifest.batching, where)
    if manifest.task in ANSWERS and not manifest.preprocess:
        raise InvalidArgumentError(
            f"{where}: a {manifest.task} model needs [preprocess]", fix="add it, or use task = 'tensor'"
        )
    if manifest.task in ANSWERS and manifest.task != "depth" and not manifest.labels:
        raise InvalidArgumentError(
            f"{where}: a {manifest.task} model needs labels", fix="add them, or use task = 'tensor'"
        )
    for table in dict.fromkeys(ANSWERS.values()):
        if getattr(manifest, table) and ANSWERS.get(manifest.task) != table:
            own = f"has [{ANSWERS[manifest.task]}]" if manifest.task in ANSWERS else "has no such table"
            raise InvalidArgumentError(f"{where}: [{table}] is not for {manifest.task}, which {own}")
    if manifest.format == "torchscript" and manifest.batching.get("threads", 1) > 1:
        raise InvalidArgumentError(
            f"{where}: a TorchScript model runs on one thread", fix="leave out [batching] threads"
        )
    if manifest.format == "torchscript" and not manifest.sha256:
        raise InvalidArgumentError(
            f"{where}: a TorchScript file is a program, so its manifest must pin it",
            fix=f'write sha256 = "..." as sha256sum prints it for {manifest.file}',
        )
