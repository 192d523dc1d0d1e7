"""Operations: what a door hands on. Nothing below a door knows which protocol a request came from.

A value of this kind is checked once, here, before anything is allocated for it: names, element types, shapes against
byte counts, how many of each. Whether the model accepts these shapes only its worker can know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from remora.errors import InvalidArgumentError
from remora.wire.remora_v1 import DTYPES, SHARE_ALIGN
from remora.workers.contract import PICTURES, Region, TensorSpec, TensorView

MAX_TENSORS = 256
MAX_RANK = 16
MAX_NAME = 256
#: Labels, objects or points of one answer.
MAX_TOP = 1000
DEFAULT_LABELS = 5
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MODEL = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.:/@-]{0,255}")

INFER = "infer"
#: Arithmetic without a model (`agent.compute`), for vAccel's callers.
COMPUTE = "compute"
#: A function of a library that the tenant uploaded (`agent.libraries`), for vAccel's callers.
EXEC = "exec"
#: Every operation the agent offers, as `Hello` announces them.
NAMES = tuple(sorted((*PICTURES, INFER)))


@dataclass(slots=True)  # never changed, as `TensorView`
class Operation:
    """One request for a worker, valid by construction (see `infer`, `picture`, `execute` and `agent.compute`)."""

    name: str
    model: str
    inputs: tuple[TensorView, ...] = ()
    outputs: tuple[str, ...] = ()
    image: memoryview | None = None
    top: int = 5
    #: On the monotonic clock.
    deadline_s: float | None = None
    #: Idempotency key within the session; 0 for none.
    request_id: int = 0
    #: Of `compute`: its name, scalar arguments, and what it writes. Of `exec`: the symbol, and what it writes at most.
    function: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    results: tuple[TensorSpec, ...] = ()
    #: Of `infer`: shared memory in which the inputs lie, and the client's place for outputs in it (offset, length).
    region: Region | None = None
    place: tuple[int, int] = (0, 0)

    @property
    def size_bytes(self) -> int:
        """Bytes of input."""
        return sum([len(tensor.data) for tensor in self.inputs]) + (len(self.image) if self.image is not None else 0)


def check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgumentError(
            f"{digest[:80]!r} is not a digest", fix="write sha256: and 64 lower-case hexadecimal digits"
        )
    return digest


def is_digest(name: str) -> bool:
    return name.startswith("sha256:")


def check_model(name: str) -> str:
    """Return the name of a catalogue model or the digest of an uploaded one, if it can be either."""
    if is_digest(name):
        return check_digest(name)
    if not _MODEL.fullmatch(name):
        raise InvalidArgumentError(
            f"{name[:80]!r} is not a model name", fix="ask Models for the names, or give sha256:<digest> of an upload"
        )
    return name


def _size_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor has. Raises as `tensor`."""
    if len(name) > MAX_NAME:
        raise InvalidArgumentError(f"the tensor name {name[:40]!r}... is longer than {MAX_NAME} characters")
    size_bytes = DTYPES.get(dtype)
    if size_bytes is None:
        raise InvalidArgumentError(
            f"tensor {name!r} has the unknown dtype {dtype[:40]!r}", fix=f"use one of {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_RANK:
        raise InvalidArgumentError(f"tensor {name!r} has {len(shape)} dimensions, at most {MAX_RANK} are allowed")
    for size in shape:
        if size < 0:
            raise InvalidArgumentError(f"tensor {name!r} has a negative size in its shape {list(shape)}")
        size_bytes *= size
    return size_bytes


def tensor(name: str, dtype: str, shape: Sequence[int], data: bytes | memoryview) -> TensorView:
    """Return a checked tensor.

    Raises:
        InvalidArgumentError: unknown dtype, rank above 16, a negative size, or bytes that are not shape times dtype.
    """
    expected = _size_bytes(name, dtype, shape)
    if expected != len(data):
        raise InvalidArgumentError(
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} has {expected} bytes, {len(data)} were sent",
            fix="send contiguous row-major bytes of exactly that size",
        )
    view = data if isinstance(data, memoryview) else memoryview(data)
    return TensorView(name, dtype, tuple(shape), view)


def shared_part(region: Region, offset: int, size_bytes: int, what: str) -> memoryview:
    """Return a part of the memory that a client shares.

    Raises:
        InvalidArgumentError: it does not lie inside, or begins at an odd place.
    """
    if offset % SHARE_ALIGN or offset + size_bytes > region.size:
        raise InvalidArgumentError(
            f"{what} takes bytes {offset} to {offset + size_bytes} of a region of {region.size} bytes",
            fix=f"begin at a multiple of {SHARE_ALIGN}, and end inside the region",
        )
    return region.memory[offset : offset + size_bytes]


def shared_tensor(region: Region, name: str, dtype: str, shape: Sequence[int], offset: int) -> TensorView:
    """Return a checked tensor whose bytes lie in the memory that a client shares."""
    size_bytes = _size_bytes(name, dtype, shape)  # before anything is multiplied or written of a shape of thousands
    checked = tensor(name, dtype, shape, shared_part(region, offset, size_bytes, "a tensor"))
    return replace(checked, offset=offset)


def infer(
    model: str,
    inputs: Iterable[TensorView],
    outputs: Sequence[str],
    *,
    deadline_s: float | None,
    request_id: int = 0,
    region: Region | None = None,
    place: tuple[int, int] = (0, 0),
) -> Operation:
    """Return a checked operation that runs `model` on tensors."""
    tensors = tuple(inputs)
    if not tensors:
        raise InvalidArgumentError("infer has no input tensor", fix="send at least one")
    names = [entry.name for entry in tensors]
    if len(set(names)) != len(names):
        raise InvalidArgumentError("two input tensors have the same name", fix="name each input once")
    if len(outputs) > MAX_TENSORS or any(len(name) > MAX_NAME for name in outputs):
        raise InvalidArgumentError(
            f"infer asks for {len(outputs)} outputs; at most {MAX_TENSORS} of {MAX_NAME} characters are allowed"
        )
    return Operation(
        INFER,
        check_model(model),
        tensors,
        tuple(outputs),
        deadline_s=deadline_s,
        request_id=request_id,
        region=region,
        place=place,
    )


def check_tensor_count(count: int) -> None:
    """Refuse too many tensors before any of them is looked at."""
    if count > MAX_TENSORS:
        raise InvalidArgumentError(f"{count} input tensors were sent, at most {MAX_TENSORS} are allowed")


def picture(
    name: str, model: str, image: bytes | memoryview, top: int, *, deadline_s: float | None, request_id: int = 0
) -> Operation:
    """Return a checked operation on one encoded picture.

    Args:
        name: A key of `workers.contract.PICTURES`.
        top: How many labels, objects or points are wanted at most; 0 for 5 labels, or all of the others.
    """
    if not len(image):
        raise InvalidArgumentError(f"{name} has no picture", fix="send the bytes of a JPEG, PNG, WebP, GIF or BMP")
    if top > MAX_TOP:
        raise InvalidArgumentError(f"{name} asks for {top} labels, at most {MAX_TOP} are allowed")
    view = image if isinstance(image, memoryview) else memoryview(image)
    most = top or (DEFAULT_LABELS if name == "classify" else MAX_TOP)
    return Operation(name, check_model(model), image=view, top=most, deadline_s=deadline_s, request_id=request_id)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a library's function: bytes, vAccel's number of their type, and the caller's own type."""

    data: memoryview
    type: int = 0
    custom_type_id: int = 0


def execute(
    library: str, symbol: str, read: Sequence[Argument], write: Sequence[Argument], *, deadline_s: float | None
) -> Operation:
    """Return a checked operation that calls a function of a library; what it writes has at most the given sizes."""
    if not 1 <= len(symbol) <= MAX_NAME:
        raise InvalidArgumentError(f"a symbol has 1 to {MAX_NAME} characters, not {len(symbol)}")
    if len(read) + len(write) > MAX_TENSORS:
        raise InvalidArgumentError(
            f"{len(read)} read and {len(write)} write arguments were sent, at most {MAX_TENSORS} are allowed"
        )
    given = [
        TensorView(f"{entry.type}:{entry.custom_type_id}", "uint8", (len(entry.data),), entry.data)
        for entry in (*read, *write)
    ]
    results = tuple(TensorSpec(view.name, view.dtype, view.shape) for view in given[len(read) :])
    return Operation(EXEC, library, tuple(given), deadline_s=deadline_s, function=symbol, results=results)
