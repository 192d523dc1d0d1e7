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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

    from remora.client.region import Region

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
_MOST_SIZES = 256
#: Form of a request -> bytes of its outputs, from the last answer: the place that the next one offers.
_output_sizes: Dict[Any, int] = {}


class Inference:
    """A request and where its tensors lie. Not for use by two calls at once."""

    def __init__(
        self, model: str, inputs: Mapping[str, Any], outputs: Optional[Sequence[str]], request_id: int
    ) -> None:
        if isinstance(outputs, str):
            raise InvalidArgumentError(f"outputs={outputs!r} is one name", fix=f"pass a list: outputs=[{outputs!r}]")
        self.inputs, self.arrays = tensors.to_wire(inputs)
        self.model = model
        self.outputs = list(outputs or ())
        self.request_id = request_id
        self._form = (model, tuple(self.outputs), tuple((one.dtype, tuple(one.shape)) for one in self.inputs))
        self._sizes = [len(one.data) for one in self.inputs]
        self._output_bytes = _output_sizes.get(self._form, 0)
        self._region: Optional[Region] = None
        self._parts: List[Tuple[int, int]] = []

    @property
    def shared_bytes(self) -> int:
        """What the request would put into shared memory; 0 if it is too small for that."""
        size = sum(self._sizes) + self._output_bytes
        return size if size >= LEAST_SHARED_BYTES else 0

    def body(self, region: Optional[Region]) -> v1.InferRequest:
        """Return the message; its tensors are in `region` afterwards if there is one and they fit."""
        self._forsake()
        request = v1.InferRequest(model=self.model, outputs=self.outputs, request_id=self.request_id)
        sizes = [*self._sizes, self._output_bytes] if self._output_bytes >= LEAST_SHARED_BYTES else self._sizes
        parts = region.take(sizes) if region is not None else None
        if region is None or parts is None:
            request.inputs = self.inputs
            return request
        self._region, self._parts = region, parts
        memory = region.memory
        for index, one in enumerate(self.inputs):
            offset, size = parts[index]
            memory[offset : offset + size] = one.data
            request.inputs.append(v1.Tensor(name=one.name, dtype=one.dtype, shape=one.shape, offset=offset))
        request.region = region.number
        if len(parts) > len(self.inputs):
            request.output_offset, request.output_bytes = parts[-1]
        return request

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
            for one in outputs:
                start = one.offset - first
                stop = start + tensors.size_bytes(one.dtype, one.shape)
                if start < 0 or stop > room:
                    raise ProtocolError("the agent's answer does not lie where the request wanted it")
                one.data = whole[start:stop]
        else:
            self._learn(outputs)
        return tensors.from_wire(outputs, arrays=self.arrays if arrays is None else arrays)

    def _learn(self, outputs: Sequence[v1.Tensor]) -> None:
        """Remember how much room the outputs take, each at a multiple of `SHARE_ALIGN`."""
        align = v1.SHARE_ALIGN
        size = sum((len(one.data) + align - 1) // align * align for one in outputs)
        if size >= LEAST_SHARED_BYTES and size != self._output_bytes:
            if len(_output_sizes) >= _MOST_SIZES:
                _output_sizes.clear()
            _output_sizes[self._form] = size

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
