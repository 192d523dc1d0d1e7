"""What a model takes and gives, and whether a request fits it: the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remora.backends.contract import Array, Spec
from remora.errors import InvalidArgumentError


class Signature:
    """The inputs and outputs of a model."""

    def __init__(self, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._input = {spec.name: spec for spec in self.inputs}
        self.output = {spec.name: spec for spec in self.outputs}
        self._all = tuple(self.output)
        for what, specs, known in (("inputs", inputs, self._input), ("outputs", outputs, self.output)):
            if len(specs) != len(known):
                raise InvalidArgumentError(f"two {what} of the model have one name: {describe(specs)}")

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        """Do what `LoadedModel.check` promises."""
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None:
                raise InvalidArgumentError(
                    f"input {spec.name!r} is missing", fix=f"the model wants {describe(self.inputs)}"
                )
            if array.dtype.name != spec.dtype or not _fits(array.shape, spec.shape):
                raise InvalidArgumentError(
                    f"input {spec.name!r} is {array.dtype.name}{list(array.shape)}",
                    fix=f"the model wants {describe((spec,))}",
                )
        if len(feeds) > len(self.inputs):
            unknown = ", ".join(sorted(set(feeds) - set(self._input)))
            raise InvalidArgumentError(
                f"the model has no input named {unknown}", fix=f"it wants {describe(self.inputs)}"
            )
        for name in wanted:
            if name not in self.output:
                raise InvalidArgumentError(
                    f"the model has no output named {name!r}", fix=f"it has {describe(self.outputs)}"
                )
        return tuple(wanted) or self._all

    def fixed(self, wanted: Sequence[str]) -> tuple[Spec, ...] | None:
        """Return the wanted outputs, None if the size of one is open."""
        specs = tuple(self.output[name] for name in wanted)
        return None if any(size < 0 for spec in specs for size in spec.shape) else specs


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def describe(specs: Sequence[Spec]) -> str:
    return ", ".join(
        f"{spec.name}: {spec.dtype}[{', '.join('any' if dim < 0 else str(dim) for dim in spec.shape)}]"
        for spec in specs
    )
