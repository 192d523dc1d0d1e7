"""Genop: 24 operations behind one method, told apart by the first argument.

Layouts, counts and types are vAccel's (its genop.c; docs/vaccel.md lists them). An argument's `size` must be the length
of its bytes: upstream's C code trusts it, here what was really sent is all there is.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence

from remora.agent import compute, operations
from remora.agent.answers import Answer
from remora.agent.doors.pictures import default_operation, text_of
from remora.agent.doors.vaccel_exec import ExecCalls, explain
from remora.agent.doors.vaccel_profiles import Profiles
from remora.agent.doors.vaccel_replies import Replies, bad_value
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import InvalidArgumentError, RemoraError, UnimplementedError
from remora.wire import vaccel
from remora.wire.ttrpc.calls import Call
from remora.wire.vaccel_enums import ArgType, OpType

Args = Sequence[vaccel.GenopArg]
#: From an operation's arguments to the operation, and from its answer to the bytes of each write argument.
Prepared = tuple[operations.Operation, Callable[[Answer], list[bytes | memoryview]]]
Prepare = Callable[[Session, "Args", "Args", float], Prepared]

OPCODES = {number: name for name, number in vars(OpType).items() if isinstance(number, int)}
#: Operations on pictures, by our names for them.
IMAGES = {
    OpType.IMAGE_CLASSIFY: "classify",
    OpType.IMAGE_DETECT: "detect",
    OpType.IMAGE_SEGMENT: "segment",
    OpType.IMAGE_POSE: "pose",
    OpType.IMAGE_DEPTH: "depth",
}
#: Exact numbers of (read, write) arguments after the opcode, where they are.
_COUNTS = {
    **dict.fromkeys(IMAGES, (1, 1)),
    OpType.IMAGE_CLASSIFY: (1, 2),
    OpType.BLAS_SGEMM: (10, 1),
    OpType.FPGA_ARRAYCOPY: (1, 1),
    OpType.FPGA_MMULT: (2, 1),
    OpType.FPGA_PARALLEL: (2, 2),
    OpType.FPGA_VECTORADD: (2, 1),
    OpType.MINMAX: (4, 3),
}
_SGEMM = (
    ("m", ArgType.INT64),
    ("n", ArgType.INT64),
    ("k", ArgType.INT64),
    ("alpha", ArgType.FLOAT32),
    ("a", ArgType.FLOAT32_ARRAY),
    ("lda", ArgType.INT64),
    ("b", ArgType.FLOAT32_ARRAY),
    ("ldb", ArgType.INT64),
    ("beta", ArgType.FLOAT32),
    ("ldc", ArgType.INT64),
)
_SCALARS = {ArgType.INT64: "<q", ArgType.FLOAT32: "<f", ArgType.UINT8: "<B"}
_NAMES = {number: name for name, number in vars(ArgType).items() if isinstance(number, int)}


def check_args(args: Args) -> None:
    """Refuse what is no argument at all.

    Raises:
        RemoraError: vAccel's conversion error, or EINVAL for an empty one.
    """
    for arg in args:
        if arg.size != len(arg.buf):
            raise bad_value(f"Argument of size {arg.size} has {len(arg.buf)} bytes")
        if not 0 <= arg.arg_type <= ArgType.CUSTOM:
            raise bad_value(f"Invalid argument type {arg.arg_type}")
        if not len(arg.buf):
            raise InvalidArgumentError("an argument is empty", fix="give each argument at least one byte")


def _typed(arg: vaccel.GenopArg, kind: int, what: str) -> memoryview:
    if arg.arg_type != kind:
        raise InvalidArgumentError(f"{what} has type {_NAMES[arg.arg_type]}", fix=f"it must be {_NAMES[kind]}")
    return memoryview(arg.buf)


def _scalar(arg: vaccel.GenopArg, kind: int, what: str) -> float:
    view, form = _typed(arg, kind, what), _SCALARS[kind]
    if len(view) != struct.calcsize(form):
        raise InvalidArgumentError(f"{what} has {len(view)} bytes, a {_NAMES[kind]} has {struct.calcsize(form)}")
    value: float = struct.unpack(form, view)[0]
    return value


def _int32(arg: vaccel.GenopArg, what: str) -> int:
    if len(arg.buf) != 4:
        raise InvalidArgumentError(f"{what} has {len(arg.buf)} bytes, an int32 has 4")
    value: int = struct.unpack("<i", arg.buf)[0]
    return value


def text_into(text: str, room: int) -> bytes:
    """Return text for a write argument: exactly its size, cut at a whole character, always with a NUL at the end."""
    cut = text.encode()[: max(0, room - 1)].decode(errors="ignore").encode()
    return cut.ljust(room, b"\0")


def _arrays(answer: Answer) -> list[bytes | memoryview]:
    return [output.data for output in answer.result.outputs]


class GenopCalls:
    """Answers `Genop`; `GenopStream` ends here, too, once its chunks are together."""

    def __init__(self, replies: Replies, profiles: Profiles, exec_calls: ExecCalls) -> None:
        self._replies = replies
        self._core = replies.core
        self._profiles = profiles
        self._prepare: Mapping[int, Prepare] = {
            **{number: self._picture(name) for number, name in IMAGES.items()},
            OpType.BLAS_SGEMM: _sgemm,
            OpType.FPGA_ARRAYCOPY: _arithmetic(compute.arraycopy),
            OpType.FPGA_MMULT: _arithmetic(compute.mmult),
            OpType.FPGA_PARALLEL: _arithmetic(compute.parallel),
            OpType.FPGA_VECTORADD: _arithmetic(compute.vectoradd),
            OpType.MINMAX: _minmax,
            OpType.EXEC: exec_calls.by_name,
            OpType.EXEC_WITH_RESOURCE: exec_calls.by_resource,
        }

    def genop(self, peer: Peer, call: Call, request: vaccel.GenopRequest, received_ns: int = 0) -> None:
        """Answer a whole request. Raises what the caller is to be told."""
        session = self._replies.session(peer, request.session_id)
        watch = self._profiles.watch(session.id)
        watch.mark(received_ns or time.monotonic_ns())
        check_args(request.read_args)
        opcode = self._opcode(request.read_args)
        read = request.read_args[1:]
        watch.lap("genop > read_args")
        write = request.write_args
        check_args(write)
        deadline_s = self._core.deadline_s(call.deadline_s)
        self._check_counts(opcode, read, write)
        operation, outputs_of = self._prepare[opcode](session, read, write, deadline_s)
        watch.lap("genop > write_args")

        def reply(answer: Answer) -> None:
            watch.lap("genop > sess.genop")
            out = [
                vaccel.GenopArg(
                    buf=data, size=len(data), arg_type=template.arg_type, custom_type_id=template.custom_type_id
                )
                for data, template in zip(outputs_of(answer), write, strict=True)
            ]
            self._replies.respond(peer, call, vaccel.GenopResponse(write_args=out), answer.drop)
            watch.lap("genop > resp_write_args")

        def failed(error: RemoraError) -> None:
            self._replies.fail(
                peer, call, explain(error) if operation.name == operations.EXEC else error, operation.model
            )

        self._replies.run(peer, call, session, operation, reply, failed)

    @staticmethod
    def _opcode(args: Args) -> int:
        if not args:
            raise InvalidArgumentError("Genop has no arguments", fix="the first one is the operation's number, a UINT8")
        opcode = int(_scalar(args[0], ArgType.UINT8, "the first argument, the operation's number,"))
        if not 1 <= opcode < len(OPCODES):
            raise InvalidArgumentError(f"Genop has no operation {opcode}", fix=f"it has 1 to {len(OPCODES) - 1}")
        return opcode

    def _check_counts(self, opcode: int, read: Args, write: Args) -> None:
        name = OPCODES[opcode]
        if opcode not in self._prepare:
            own = (
                " by Genop; it has a method of its own"
                if OpType.TF_MODEL_LOAD <= opcode <= OpType.TORCH_MODEL_RUN
                else ""
            )
            raise UnimplementedError(f"{name} is not offered{own}")
        wanted = _COUNTS.get(opcode, (len(read), len(write)))
        if (len(read), len(write)) != wanted:
            raise InvalidArgumentError(
                f"{name} takes {wanted[0]} read and {wanted[1]} write arguments, got {len(read)} and {len(write)}"
            )

    def _picture(self, name: str) -> Prepare:
        def prepare(session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
            image = _typed(read[0], ArgType.BUFFER, "the picture")
            for arg in write:
                _typed(arg, ArgType.UCHAR_ARRAY, "an output")
            operation = default_operation(self._core, session, name, image, deadline_s)
            rooms = [len(arg.buf) for arg in write]

            def outputs_of(answer: Answer) -> list[bytes | memoryview]:
                text = text_of(name, answer, rooms[-1])
                # CLASSIFY writes the name of an annotated picture first; there is none here, so it is empty.
                texts = ["", text] if name == "classify" else [text]
                return [text_into(part, room) for part, room in zip(texts, rooms, strict=True)]

            return operation, outputs_of

        return prepare


def _arithmetic(make: Callable[..., operations.Operation]) -> Prepare:
    """Of untyped arrays: `make` takes what is read, the room for what is written, and the deadline."""

    def prepare(_session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
        views = [memoryview(arg.buf) for arg in read]
        return make(*views, *(len(arg.buf) for arg in write), deadline_s), _arrays

    return prepare


def _sgemm(_session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
    numbers: dict[str, float] = {}
    arrays: dict[str, memoryview] = {}
    for arg, (name, kind) in zip(read, _SGEMM, strict=True):
        if kind == ArgType.FLOAT32_ARRAY:
            arrays[name] = _typed(arg, kind, name)
        else:
            numbers[name] = _scalar(arg, kind, name)
    c = _typed(write[0], ArgType.FLOAT32_ARRAY, "c")
    return compute.sgemm(numbers, arrays["a"], arrays["b"], c, deadline_s), _arrays


def _minmax(_session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
    count, low, high = (_int32(arg, name) for arg, name in zip(read[1:], ("ndata", "low", "high"), strict=True))
    for arg, name in zip(write[1:], ("min", "max"), strict=True):
        if len(arg.buf) != 8:
            raise InvalidArgumentError(f"{name} has room for {len(arg.buf)} bytes, a double has 8")
    return compute.minmax(memoryview(read[0].buf), count, low, high, len(write[0].buf), deadline_s), _arrays
