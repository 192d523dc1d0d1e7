"""Infer of the native door: from the request's bytes to an operation, and from the answer to bytes.

A client that shares memory sends the same few bytes again and again, but for the id at their end. What was made of them
is kept by these bytes, for each connection: decoded and checked once. Everything that may change between two requests
(policy, quotas, the session, the model) is looked at for each of them further in, by `execution`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.operations import INFER, Operation
from remora.agent.peers import Peer
from remora.agent.sharing import region_of
from remora.errors import InvalidArgumentError
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Limits
from remora.wire.protobuf_kinds import read_varint, varint
from remora.workers.contract import Region, TensorPlace, TensorView

if TYPE_CHECKING:
    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.core import Body

#: More elements than any valid request has: 256 tensors of 16 dimensions.
DECODE_LIMITS = Limits(max_depth=4, max_elements=8192)
#: Forms kept for a connection; who sends more of them is decoded anew.
_MOST_FORMS = 64
#: Key of `request_id`, and the lengths of key and value together for nearly every random 64-bit number.
_ID_KEY = 0x20
_ID_BYTES = (10, 11)


class Form:
    """What a request is, but for its id and deadline."""

    __slots__ = ("_head", "_number", "_places", "_start", "operation")

    def __init__(self, peer: Peer, request: v1.InferRequest) -> None:
        """Check a request.

        Raises:
            RemoraError: something in it is wrong.
        """
        operations.check_tensor_count(len(request.inputs))
        region, place, self._number = None, (0, 0), request.region
        if request.region:
            region = region_of(peer, request.region)
            place = request.output_offset, request.output_bytes
            operations.shared_part(region, *place, "the place for outputs")
        self.operation = operations.infer(
            request.model,
            [_tensor(region, given) for given in request.inputs],
            request.outputs,
            deadline_s=None,
            region=region,
            place=place,
        )
        #: The last answer in shared memory: where it lay, and its bytes up to the timing.
        self._places: tuple[TensorPlace, ...] | None = None
        self._start = 0
        self._head = b""

    def ask(self, deadline_s: float, request_id: int) -> Operation:
        """Return the operation of one request."""
        form = self.operation
        return Operation(
            INFER,
            form.model,
            form.inputs,
            form.outputs,
            deadline_s=deadline_s,
            request_id=request_id,
            region=form.region,
            place=form.place,
        )

    def answer(self, answer: Answer) -> Body:
        """Return the message for an answer."""
        result = answer.result
        # A request that was sent again may get the answer of its first run, which lies in other memory.
        if result.region is None or result.region is not self.operation.region:
            outputs = [
                v1.Tensor(name=out.name, dtype=out.dtype, shape=list(out.shape), data=out.data)
                for out in result.outputs
            ]
            timing = v1.Timing(queue_us=answer.queue_us, run_us=result.run_us)
            return v1.InferResponse(outputs=outputs, timing=timing)
        if result.places is not self._places or result.start != self._start or not self._head:
            outputs = [
                v1.Tensor(name=out.name, dtype=out.dtype, shape=list(out.shape), offset=out.offset)
                for out in result.outputs
            ]
            self._head = v1.InferResponse(outputs=outputs, region=self._number).to_bytes()
            self._places, self._start = result.places, result.start
        return [self._head + _timing(answer.queue_us, result.run_us)]


def form_of(peer: Peer, payload: Piece) -> tuple[Form, int]:
    """Return the form and the id of a request.

    Raises:
        RemoraError: it is malformed, or something in it is wrong.
    """
    forms = peer.forms
    if forms is not None and type(payload) is bytes:
        for length in _ID_BYTES:
            if payload[-length : 1 - length] == b"\x20":
                form = forms.get(payload[:-length])
                if form is not None:
                    request_id, end = read_varint(payload, len(payload) - length + 1)
                    if end == len(payload):
                        return form, request_id
    request = v1.InferRequest.decode(payload, limits=DECODE_LIMITS)
    form = Form(peer, request)
    if request.region:
        _keep(peer, payload, request, form)
    return form, request.request_id


def _keep(peer: Peer, payload: Piece, request: v1.InferRequest, form: Form) -> None:
    """Remember a form by the request's bytes, if they end with its id."""
    whole = bytes(payload)
    for length in _ID_BYTES:
        if len(whole) > length and whole[-length] == _ID_KEY and whole[1 - length :] == varint(request.request_id):
            head = v1.InferRequest.decode(whole[:-length], limits=DECODE_LIMITS)
            head.request_id = request.request_id
            if head == request:
                if peer.forms is None or len(peer.forms) >= _MOST_FORMS:
                    peer.forms = {}
                peer.forms[whole[:-length]] = form


def _timing(queue_us: int, run_us: int) -> bytes:
    """Return the field `timing` of an answer."""
    timing = (b"\x08" + varint(queue_us) if queue_us else b"") + (b"\x10" + varint(run_us) if run_us else b"")
    return b"\x12" + varint(len(timing)) + timing


def _tensor(region: Region | None, given: v1.Tensor) -> TensorView:
    if region is None:
        return operations.tensor(given.name, given.dtype, given.shape, given.data)
    if given.data:
        raise InvalidArgumentError(
            f"tensor {given.name!r} has bytes in the message, and the message names a region", fix="use one of the two"
        )
    return operations.shared_tensor(region, given.name, given.dtype, given.shape, given.offset)
