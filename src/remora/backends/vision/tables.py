"""What the tables of a manifest that describe a model's answer have in common: keys, defaults, names of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from remora.backends.contract import Array, LoadedModel, Spec
from remora.backends.vision.preprocess import Preprocess
from remora.errors import InternalError, InvalidArgumentError


def preprocess_of(manifest: Mapping[str, Any], task: str) -> Preprocess:
    """Return the `[preprocess]` table that every picture task needs."""
    table = manifest.get("preprocess")
    if not isinstance(table, Mapping) or not table:
        raise InvalidArgumentError(
            f"this model has no [preprocess] table in its manifest, so it cannot do {task}",
            fix="send tensors with infer, or add the table",
        )
    return Preprocess.from_manifest(table)


class Table:
    """One table of a manifest, asked for its keys one by one.

    Raises:
        InvalidArgumentError: names the key that is wrong, and what is allowed.
    """

    def __init__(self, manifest: Mapping[str, Any], name: str, keys: Sequence[str]) -> None:
        self.name = name
        self._values = manifest.get(name) or {}
        unknown = set(self._values) - set(keys)
        if unknown:
            raise InvalidArgumentError(
                f"[{name}] has unknown keys: {', '.join(sorted(unknown))}", fix=f"allowed are {', '.join(keys)}"
            )

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """Return one of some words; the first is the default."""
        given = self._values.get(key, allowed[0])
        if given not in allowed:
            raise InvalidArgumentError(f"[{self.name}] {key} is {given!r}", fix=f"allowed are {', '.join(allowed)}")
        return str(given)

    def share(self, key: str, default: float) -> float:
        """Return a number between 0 and 1."""
        given = self._values.get(key, default)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise InvalidArgumentError(f"[{self.name}] {key} is {given!r}", fix="allowed are 0 to 1")
        return float(given)

    def columns(self, key: str, default: Sequence[str]) -> tuple[int, ...]:
        """Return where in a row of the model's answer each of the default names stands."""
        given = self._values.get(key, list(default))
        if not isinstance(given, list) or any(name not in given for name in default) or len(set(given)) != len(given):
            raise InvalidArgumentError(
                f"[{self.name}] {key} is {given!r}", fix=f"name each of {', '.join(default)} once, in the model's order"
            )
        return tuple(given.index(name) for name in default)

    def width(self, key: str, default: Sequence[str]) -> int:
        """Return how many numbers a row of the model's answer has."""
        return len(self._values.get(key, default))

    def tensor(self, key: str, specs: Sequence[Spec]) -> str:
        """Return the name of an input or output: the one given, else the model's first."""
        given = self._values.get(key)
        names = [spec.name for spec in specs]
        if given is None and names:
            return names[0]
        if given is None or given not in names:
            raise InvalidArgumentError(f"[{self.name}] {key} is {given!r}", fix=f"the model has {', '.join(names)}")
        return str(given)


def need_labels(classes: int, task: str, least: int = 1) -> int:
    """Return how many labels there are, if they are as many as a task needs."""
    if classes < least:
        raise InvalidArgumentError(f"a manifest for {task} needs at least {least} labels, this one has {classes}")
    return classes


def check_input(model: LoadedModel, name: str, how: Preprocess) -> None:
    """Refuse a manifest whose pictures the model would refuse one by one."""
    spec = next(spec for spec in model.inputs if spec.name == name)
    shape = (1, 3, how.height, how.width) if how.layout == "nchw" else (1, how.height, how.width, 3)
    fits = len(spec.shape) == 4 and all(want in (-1, size) for want, size in zip(spec.shape, shape, strict=True))
    if spec.dtype and (spec.dtype != how.dtype or not fits):
        raise InvalidArgumentError(
            f"[preprocess] makes {how.dtype}{list(shape)} of a picture, input {name!r} takes "
            f"{spec.dtype}{list(spec.shape)}",
            fix="correct width, height, layout or dtype",
        )


def finite(answer: Array) -> Array:
    """Return a model's answer as float64, if all of it are numbers."""
    values = np.asarray(answer, np.float64)
    if not np.isfinite(values).all():
        raise InternalError("the model answered with scores that are not numbers")
    return values
