"""What a request's answer is to the caller: plain values, free of the wire's message classes.

A caller may keep them, compare them and print them; none of them holds on to a receive buffer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, Tuple

    from remora.wire import remora_v1 as v1


class Value:
    """Base of the values: equal by contents, printable, unpackable. NamedTuple would cost the import of typing."""

    __slots__: Tuple[str, ...] = ()

    def _asdict(self) -> Dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
        return f"{type(self).__name__}({fields})"


class Label(Value):
    """One class a picture may belong to; `score` is its probability, 0..1."""

    __slots__ = ("index", "name", "score")

    def __init__(self, index: int, name: str, score: float) -> None:
        self.index = index
        self.name = name
        self.score = score


class Detection(Value):
    """An object in a picture; `box` holds its corners x1, y1, x2, y2 in pixels of the upright picture."""

    __slots__ = ("index", "name", "score", "box")

    def __init__(self, index: int, name: str, score: float, box: Tuple[float, float, float, float]) -> None:
        self.index = index
        self.name = name
        self.score = score
        self.box = box


class Keypoint(Value):
    """A point of a body, in pixels of the upright picture."""

    __slots__ = ("index", "name", "score", "x", "y")

    def __init__(self, index: int, name: str, score: float, x: float, y: float) -> None:
        self.index = index
        self.name = name
        self.score = score
        self.x = x
        self.y = y


class Segmentation(Value):
    """Which label each place of a picture has.

    `mask` is uint8 [height, width] of the model's own size and stands for the whole picture; a value is the number of a
    label in `labels`. It lies on the memory of the answer, as the results of `infer` do.
    """

    __slots__ = ("labels", "mask")

    def __init__(self, labels: Tuple[str, ...], mask: Any) -> None:  # Tensor, or numpy.ndarray
        self.labels = labels
        self.mask = mask


class TensorSpec(Value):
    """What a model expects or returns under one name; -1 in `shape` where any size is accepted."""

    __slots__ = ("name", "dtype", "shape")

    def __init__(self, name: str, dtype: str, shape: Tuple[int, ...]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape


class ModelInfo(Value):
    """A model the session may use; `name` is `sha256:<hex>` for one that this tenant uploaded."""

    __slots__ = ("name", "task", "inputs", "outputs", "digest", "description", "licence", "size_bytes")

    def __init__(
        self,
        name: str,
        task: str,
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
        digest: str,
        description: str,
        licence: str,
        size_bytes: int,
    ) -> None:
        self.name = name
        self.task = task
        self.inputs = inputs
        self.outputs = outputs
        self.digest = digest
        self.description = description
        self.licence = licence
        self.size_bytes = size_bytes


def label(message: v1.Label) -> Label:
    return Label(message.index, message.name, message.score)


def detection(message: v1.Detection) -> Detection:
    return Detection(message.index, message.name, message.score, (message.x1, message.y1, message.x2, message.y2))


def keypoint(message: v1.Keypoint) -> Keypoint:
    return Keypoint(message.index, message.name, message.score, message.x, message.y)


def model_info(message: v1.ModelInfo) -> ModelInfo:
    return ModelInfo(
        message.name,
        message.task,
        tuple(_spec(spec) for spec in message.inputs),
        tuple(_spec(spec) for spec in message.outputs),
        message.digest,
        message.description,
        message.licence,
        message.size_bytes,
    )


def _spec(message: v1.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, message.dtype, tuple(message.shape))
