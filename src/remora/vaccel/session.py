"""`Session`: the object whose methods are vAccel's operations."""

from __future__ import annotations

import errno
from itertools import count

from remora.vaccel import genop, link
from remora.vaccel.arg import Arg
from remora.vaccel.errors import FFIError
from remora.vaccel.ops.tf import TFMixin
from remora.vaccel.ops.tf.lite import TFLiteMixin
from remora.vaccel.ops.torch import TorchMixin
from remora.vaccel.values import like, numbers
from remora.wire import vaccel
from remora.wire.vaccel_enums import ArgType, OpType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, List, Optional, Sequence, Tuple, Type

    from remora.vaccel.resource import Resource

_REMOTE = 0x4000
#: What vaccel-python gives an operation to write text into.
_TEXT_BYTES = 512
_ids = count(1)


class Session(TorchMixin, TFMixin, TFLiteMixin):
    """A session at the agent. It ends with the object, with `close()`, or with its `with` block.

    Args:
        flags: `PluginType`s that a vAccel agent chooses its plugin by.

    Raises:
        FFIError: no agent answers (ECONNRESET), or it refuses.
    """

    def __init__(self, flags: int = 0) -> None:
        self.remote_id = 0
        self.id = next(_ids)
        self.flags = int(flags)
        request = vaccel.SessionCreateRequest(flags=self.flags & ~_REMOTE)
        answer = link.call("CreateSession", request, vaccel.SessionCreateResponse)
        if answer.session_id <= 0:
            raise FFIError(errno.EPROTO, f"the agent answered with the impossible session id {answer.session_id}")
        self.remote_id = answer.session_id

    @property
    def is_remote(self) -> bool:
        return True

    def has_resource(self, resource: Resource) -> bool:
        """True if the resource is registered with this session."""
        return resource.registered(self)

    def close(self) -> None:
        """End the session at the agent. Twice is no error."""
        number, self.remote_id = self.remote_id, 0
        if number:
            link.call("DestroySession", vaccel.SessionDestroyRequest(session_id=number), vaccel.Empty)

    def __del__(self) -> None:
        try:
            if getattr(self, "remote_id", 0):
                self.close()
        except (FFIError, OSError, ImportError, TypeError, AttributeError):
            pass  # the agent is gone, or the interpreter is going: the agent ends the session by its lease

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _type: Optional[Type[BaseException]], _error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        self.close()

    # -- generic ----------------------------------------------------------------------------------------------------

    def noop(self) -> None:
        """Do nothing at the agent: a round trip that fails when the session is gone. (No-op has no opcode of Genop.)"""
        link.call(
            "UpdateSession", vaccel.SessionUpdateRequest(session_id=self.remote_id, flags=self.flags), vaccel.Empty
        )

    def genop(self, arg_read: Sequence[Arg], arg_write: Sequence[Arg]) -> None:
        """Run an operation by its number, the first of `arg_read` (UINT8). `arg_write` gets what it writes."""
        genop.genop(self.remote_id, arg_read, arg_write)

    def _run(self, opcode: int, read: Sequence[Arg], write: Sequence[Arg]) -> None:
        self.genop([Arg(opcode, ArgType.UINT8), *read], write)

    def exec(
        self,
        library: Any,
        symbol: str,
        arg_read: Optional[Sequence[Any]] = None,
        arg_write: Optional[Sequence[Any]] = None,
    ) -> Optional[List[Any]]:
        """Call a function of a library that the agent knows by name.

        vAccel's own agent takes a path of its host; Remora's refuses that (EPERM) and takes the `sha256:` digest of a
        library that this tenant has registered. Arguments, results and errors as `exec_with_resource`.
        """
        first = [Arg(str(library), ArgType.STRING), Arg(symbol, ArgType.STRING)]
        return self._call_library(OpType.EXEC, first, arg_read, arg_write)

    def exec_with_resource(
        self,
        resource: Resource,
        symbol: str,
        arg_read: Optional[Sequence[Any]] = None,
        arg_write: Optional[Sequence[Any]] = None,
    ) -> Optional[List[Any]]:
        """Call `int symbol(read, nr_read, write, nr_write)` of a library that is registered as a resource (LIB).

        Args:
            resource: One shared object, or several of which the last is called and the others are loaded before it.
            arg_read, arg_write: `Arg`s, or values as `Arg` takes them. The function may change all of `arg_write`.

        Returns:
            The values of `arg_write` after the call, None if there are none.

        Raises:
            FFIError: EPERM where policy forbids it, EINVAL if the library cannot be loaded, ENOSYS for a symbol that it
                does not have, EPROTO if the function did not return 0 or ended its worker, ETIMEDOUT at the deadline.
        """
        first = [Arg(resource.remote_id, ArgType.INT64), Arg(symbol, ArgType.STRING)]
        return self._call_library(OpType.EXEC_WITH_RESOURCE, first, arg_read, arg_write)

    def _call_library(
        self, opcode: int, first: List[Arg], read: Optional[Sequence[Any]], write: Optional[Sequence[Any]]
    ) -> Optional[List[Any]]:
        reads = [arg if isinstance(arg, Arg) else Arg(arg) for arg in read or ()]
        writes = [arg if isinstance(arg, Arg) else Arg(arg) for arg in write or ()]
        self._run(opcode, [*first, *reads], writes)
        return None if write is None else [arg.buf for arg in writes]

    # -- pictures ---------------------------------------------------------------------------------------------------

    def classify(self, source: Any) -> Tuple[str, str]:
        """Return (tags, name of an annotated picture) for the bytes of a picture file."""
        request = vaccel.ImageRequest(session_id=self.remote_id, image=source)
        return _text(link.call("ImageClassification", request, vaccel.ImageResponse).tags), ""

    def detect(self, source: Any) -> str:
        """Return what the agent's detection model found."""
        return self._picture(OpType.IMAGE_DETECT, source)

    def segment(self, source: Any) -> str:
        """Return what the agent's segmentation model found."""
        return self._picture(OpType.IMAGE_SEGMENT, source)

    def pose(self, source: Any) -> str:
        """Return what the agent's pose model found."""
        return self._picture(OpType.IMAGE_POSE, source)

    def depth(self, source: Any) -> str:
        """Return what the agent's depth model found."""
        return self._picture(OpType.IMAGE_DEPTH, source)

    def _picture(self, opcode: int, source: Any) -> str:
        out = Arg(bytearray(_TEXT_BYTES), ArgType.UCHAR_ARRAY)
        self._run(opcode, [Arg(source, ArgType.BUFFER)], [out])
        return _text(out.buf)

    # -- arithmetic: lists in, lists out; numpy in, numpy out; other buffers give array.array -------------------------

    def sgemm(
        self, m: int, n: int, k: int, alpha: float, a: Any, lda: int, b: Any, ldb: int, beta: float, ldc: int
    ) -> Any:
        """Return alpha * A @ B for row-major float32 matrices, m*ldc numbers. (C starts as zeros: no beta.)"""
        whole = [Arg(size, ArgType.INT64) for size in (m, n, k)]
        out = Arg(bytearray(4 * max(1, m) * max(1, ldc)), ArgType.FLOAT32_ARRAY)
        read = [
            *whole,
            Arg(float(alpha), ArgType.FLOAT32),
            Arg(numbers(a, "f"), ArgType.FLOAT32_ARRAY),
            Arg(lda, ArgType.INT64),
            Arg(numbers(b, "f"), ArgType.FLOAT32_ARRAY),
            Arg(ldb, ArgType.INT64),
            Arg(float(beta), ArgType.FLOAT32),
            Arg(ldc, ArgType.INT64),
        ]
        self._run(OpType.BLAS_SGEMM, read, [out])
        return like(a, memoryview(out.buf), "f")

    def minmax(self, indata: Any, ndata: int, low_threshold: int, high_threshold: int) -> Tuple[Any, float, float]:
        """Return the first `ndata` doubles, and least and greatest of them within the thresholds; bytes for bytes."""
        data = numbers(indata, "d", ndata)
        out = Arg(bytearray(8 * max(1, ndata)))
        least, greatest = Arg(0.0, ArgType.FLOAT64), Arg(0.0, ArgType.FLOAT64)
        read = [Arg(data), *(Arg(number, ArgType.INT32) for number in (ndata, low_threshold, high_threshold))]
        self._run(OpType.MINMAX, read, [out, least, greatest])
        kept = bytes(out.buf) if isinstance(indata, bytes) else like(indata, memoryview(out.buf), "d")
        return kept, least.buf, greatest.buf

    def fpga_arraycopy(self, a: Any) -> Any:
        """Return a copy of 32-bit integers."""
        return self._vectors(OpType.FPGA_ARRAYCOPY, "i", a)[0]

    def fpga_mmult(self, a: Any, b: Any) -> Any:
        """Return the product of two square row-major float32 matrices."""
        return self._vectors(OpType.FPGA_MMULT, "f", a, b)[0]

    def fpga_parallel(self, a: Any, b: Any) -> Tuple[Any, Any]:
        """Return the sums and the products of the elements of two float32 vectors."""
        total, product = self._vectors(OpType.FPGA_PARALLEL, "f", a, b, outputs=2)
        return total, product

    def fpga_vadd(self, a: Any, b: Any) -> Any:
        """Return the sums of the elements of two float32 vectors."""
        return self._vectors(OpType.FPGA_VECTORADD, "f", a, b)[0]

    def _vectors(self, opcode: int, code: str, *inputs: Any, outputs: int = 1) -> List[Any]:
        data = [numbers(value, code) for value in inputs]
        kind = ArgType.INT32_ARRAY if code == "i" else ArgType.FLOAT32_ARRAY
        out = [Arg(bytearray(len(data[0])), kind) for _ in range(outputs)]
        self._run(opcode, [Arg(value, kind) for value in data], out)
        return [like(inputs[0], memoryview(arg.buf), code) for arg in out]

    def __repr__(self) -> str:
        return f"<Session id={self.id} remote_id={self.remote_id} flags={self.flags:#x}>"


def _text(data: Any) -> str:
    return bytes(data).partition(b"\0")[0].decode(errors="replace")
