"""One Infer request: what of it is the same from call to call, and how its tensors travel.

Small requests, and all that go to an agent which shares no memory, carry their tensors in the message. Others write
them into the region of their connection. Which way it went matters to nobody but this module: a request that is sent
again on another connection is put together again.
"""

from __future__ import annotations

from remora.client import tensors
from remora.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ResourceExhaustedError,
)
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import DEFAULT, DecodeError, Limits
from remora.wire.protobuf_kinds import varint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

    from remora.client.region import Region
    from remora.wire.ttrpc.core import Body

#: From here on a tensor is cheaper to share than to send (two system calls, each with a copy at both ends).
LEAST_SHARED_BYTES = 32 << 10
#: After these answers the agent has no use for the request's memory any more. After others a worker may still run it.
_OVER = (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
_MOST_KNOWN = 256
#: Form of a request -> bytes of its outputs, from the last answer: the place that the next one offers.
_output_sizes: Dict[Any, int] = {}
#: Form, region and places of a request in shared memory -> its message up to the id, which comes last.
_heads: Dict[Any, bytes] = {}
#: Messages of answers in shared memory up to the timing, which comes last -> what they say. Never changed.
_answers: Dict[bytes, v1.InferResponse] = {}
_ID_KEY = b"\x20"
_LONGEST_TIMING = 22


class Inference:
    """A request and where its tensors lie. Not for use by two calls at once."""

    def __init__(
        self, model: str, inputs: Mapping[str, Any], outputs: Optional[Sequence[str]], request_id: int
    ) -> None:
        if isinstance(outputs, str):
            raise InvalidArgumentError(f"outputs={outputs!r} is one name", fix=f"pass a list: outputs=[{outputs!r}]")
        self.inputs, self.arrays = tensors.read(inputs)
        self.model = model
        self.outputs = list(outputs or ())
        self.request_id = request_id
        self._form = (model, tuple(self.outputs), tuple([(name, one.dtype, one.shape) for name, one in self.inputs]))
        self._sizes = [len(one.data) for _, one in self.inputs]
        self._output_bytes = _output_sizes.get(self._form, 0)
        self._region: Optional[Region] = None
        self._parts: List[Tuple[int, int]] = []

    @property
    def shared_bytes(self) -> int:
        """What the request would put into shared memory; 0 if it is too small for that."""
        size = sum(self._sizes) + self._output_bytes
        return size if size >= LEAST_SHARED_BYTES else 0

    def body(self, region: Optional[Region]) -> Body:
        """Return the message; its tensors are in `region` afterwards if there is one and they fit."""
        self._forsake()
        # Also a few bytes of outputs: an answer that only says where they lie is one that both ends know already.
        sizes = [*self._sizes, self._output_bytes] if self._output_bytes else self._sizes
        parts = region.take(sizes) if region is not None else None
        if region is None or parts is None:
            return v1.InferRequest(
                model=self.model,
                inputs=tensors.to_wire(self.inputs),
                outputs=self.outputs,
                request_id=self.request_id,
            )
        self._region, self._parts = region, parts
        memory = region.memory
        for (offset, size), (_, one) in zip(parts, self.inputs):  # noqa: B905 - one part more, for the outputs
            memory[offset : offset + size] = one.data
        key = (self._form, region.number, tuple(parts))
        head = _heads.get(key)
        if head is None:
            head = self._head(region.number, parts)
            _remember(_heads, key, head)
        return [head + _ID_KEY + varint(self.request_id)]

    def _head(self, number: int, parts: List[Tuple[int, int]]) -> bytes:
        request = v1.InferRequest(model=self.model, outputs=self.outputs, region=number)
        for index, (name, one) in enumerate(self.inputs):
            request.inputs.append(v1.Tensor(name=name, dtype=one.dtype, shape=list(one.shape), offset=parts[index][0]))
        if len(parts) > len(self.inputs):
            request.output_offset, request.output_bytes = parts[-1]
        return request.to_bytes()

    @property
    def is_shared(self) -> bool:
        """True if the message that was put together last needs shared memory."""
        return self._region is not None

    def failed(self, error: BaseException) -> None:
        """Note that a call ended without an answer."""
        if isinstance(error, _OVER):
            self._release(self._parts)
        self._forsake()

    def answered(self, answer: v1.InferResponse, arrays: Optional[bool]) -> Dict[str, Any]:
        """Return the results by name."""
        outputs = answer.outputs
        region, count = self._region, len(self.inputs)
        place = self._parts[count:]
        self._release(self._parts[:count] if answer.region else self._parts)
        if answer.region:
            if region is None or answer.region != region.number or not place:
                raise ProtocolError("the agent's answer lies in memory that the request did not name")
            first, room = place[0]
            whole = region.result(first, room)
            found: List[Tuple[v1.Tensor, Any]] = []
            for one in outputs:
                start = one.offset - first
                stop = start + tensors.size_bytes(one.dtype, one.shape)
                if start < 0 or stop > room:
                    raise ProtocolError("the agent's answer does not lie where the request wanted it")
                found.append((one, whole[start:stop]))
        else:
            self._learn(outputs)
            found = [(one, one.data) for one in outputs]
        as_arrays = self.arrays if arrays is None else arrays
        return {one.name: tensors.result(data, one.dtype, one.shape, arrays=as_arrays) for one, data in found}

    def _learn(self, outputs: Sequence[v1.Tensor]) -> None:
        """Remember how much room the outputs take, each at a multiple of `SHARE_ALIGN`."""
        align = v1.SHARE_ALIGN
        size = sum((len(one.data) + align - 1) // align * align for one in outputs)
        if size != self._output_bytes:
            _remember(_output_sizes, self._form, size)

    def _release(self, parts: List[Tuple[int, int]]) -> None:
        """Give parts back; the others are a result's."""
        if self._region is not None:
            for offset, size in parts:
                self._region.give_back(offset, size)
        self._region, self._parts = None, []

    def _forsake(self) -> None:
        """Leave the memory to whoever may still use it: another request must not write there."""
        if self._region is not None:
            self._region.forsake(sum(size for _, size in self._parts))
        self._region, self._parts = None, []


class InferAnswer(v1.InferResponse):
    """An answer whose bytes up to the timing are looked up before they are decoded."""

    @classmethod
    def decode(cls: Any, buffer: Any, *, limits: Limits = DEFAULT) -> Any:  # one for many, as Message's own
        """Return the message; one in shared memory may be another call's, and must not be changed."""
        size = len(buffer)
        if size < LEAST_SHARED_BYTES:
            data = bytes(buffer)
            for length in range(min(_LONGEST_TIMING, size - 1)):
                start = size - length - 2
                if data[start] == 0x12 and data[start + 1] == length:
                    head = data[:start]
                    known = _answers.get(head)
                    if known is not None:
                        return known
            whole = v1.InferResponse.decode(data, limits=limits)
            if whole.region:
                _learn_answer(whole, data, limits)
            return whole
        return v1.InferResponse.decode(buffer, limits=limits)


def _learn_answer(whole: v1.InferResponse, data: bytes, limits: Limits) -> None:
    """Remember an answer that lies in shared memory by what comes before its timing, if that is all that follows."""
    for length in range(min(_LONGEST_TIMING, len(data) - 1)):
        start = len(data) - length - 2
        if data[start] != 0x12 or data[start + 1] != length:
            continue
        try:
            short = v1.InferResponse.decode(data[:start], limits=limits)
        except DecodeError:
            continue  # the timing does not begin there
        if short.timing is None and whole.outputs == short.outputs and whole.region == short.region:
            _remember(_answers, data[:start], short)


def _remember(table: Dict[Any, Any], key: Any, value: Any) -> None:
    if len(table) >= _MOST_KNOWN:
        table.clear()
    table[key] = value
