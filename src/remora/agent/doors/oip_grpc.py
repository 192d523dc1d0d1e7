"""The Open Inference Protocol over gRPC: `inference.GRPCInferenceService`, unary calls only, and `grpc.health.v1`.

Tensors in `raw_input_contents` are slices of the message, which lies in memory that the worker maps. Methods that
Triton adds and this agent does not offer are refused by their name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.cards import ModelCard
from remora.agent.core import Core
from remora.agent.doors import health, oip, oip_values
from remora.agent.doors import oip_messages as messages
from remora.agent.doors.calls import as_remora_error
from remora.agent.peers import Peer
from remora.agent.web.http2_streams import GrpcExchange
from remora.errors import InvalidArgumentError, NotFoundError, RemoraError, UnimplementedError
from remora.wire import health_v1
from remora.wire.protobuf import Limits, Message
from remora.workers.contract import TensorSpec, TensorView

NAME = "oip_grpc"
#: More elements than any valid request has: 256 tensors of 16 dimensions, and parameters.
_DECODE_LIMITS = Limits(max_depth=4, max_elements=8192)


def _parameters(given: dict[str, messages.InferParameter]) -> dict[str, Any]:
    return {name: entry.value for name, entry in given.items()}


def _tensor_metadata(specs: Sequence[TensorSpec]) -> list[messages.TensorMetadata]:
    return [messages.TensorMetadata(**entry) for entry in oip_values.metadata(specs)]


class GrpcDoor:
    """Answers the calls of the gRPC face."""

    def __init__(self, core: Core, inferences: oip.Inferences) -> None:
        self._core = core
        self._inferences = inferences
        self._health = health.Health(core, (messages.SERVICE,))
        self._methods: dict[str, tuple[type[Message], Callable[[Peer, GrpcExchange, Any], None]]] = {
            "ServerLive": (messages.Empty, self._live),
            "ServerReady": (messages.Empty, self._ready),
            "ModelReady": (messages.ModelRequest, self._model_ready),
            "ServerMetadata": (messages.Empty, self._server),
            "ModelMetadata": (messages.ModelRequest, self._metadata),
            "ModelInfer": (messages.ModelInferRequest, self._infer),
            "RepositoryIndex": (messages.RepositoryIndexRequest, self._index),
        }

    def handle(self, peer: Peer, exchange: GrpcExchange) -> None:
        """Answer a call, now or later."""
        exchange.service, exchange.method = NAME, "unknown"
        try:
            service, _, method = exchange.path.removeprefix("/").rpartition("/")
            if service == health_v1.SERVICE:
                exchange.service, exchange.method = health.NAME, "Watch" if method == "Watch" else "Check"
                if method == "Watch":
                    self._health.watch(exchange, exchange.body)
                    return
                exchange.respond(self._health.call(method, exchange.body).encode())
                return
            if service != messages.SERVICE:
                raise UnimplementedError(
                    f"there is no service {service[:100]!r} here", fix=f"the service is {messages.SERVICE}"
                )
            entry = self._methods.get(method)
            if entry is None:
                if method in messages.NOT_OFFERED:
                    exchange.method = method
                raise UnimplementedError(
                    f"{messages.SERVICE}/{method[:100]} is not offered", fix=f"offered are {', '.join(self._methods)}"
                )
            exchange.method = method
            entry[1](peer, exchange, entry[0].decode(exchange.body, limits=_DECODE_LIMITS))
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            self._fail(peer, exchange, as_remora_error(self._core, error))

    def _respond(
        self, peer: Peer, exchange: GrpcExchange, message: Message, on_sent: Callable[[], None] | None = None
    ) -> None:
        pieces = message.encode()
        self._core.metrics.answered(NAME, exchange.method, peer.identity.tenant, "OK")
        exchange.respond(pieces, on_sent=on_sent)

    def _fail(self, peer: Peer, exchange: GrpcExchange, error: RemoraError, model: str = "") -> None:
        if exchange.fail(error):
            self._core.refused(NAME, exchange.method, peer, error, model=model)

    # -- the server -------------------------------------------------------------------------------------------------

    def _live(self, peer: Peer, exchange: GrpcExchange, _request: messages.Empty) -> None:
        self._respond(peer, exchange, messages.ServerLiveResponse(live=True))

    def _ready(self, peer: Peer, exchange: GrpcExchange, _request: messages.Empty) -> None:
        self._respond(peer, exchange, messages.ServerReadyResponse(ready=self._inferences.ready()))

    def _server(self, peer: Peer, exchange: GrpcExchange, _request: messages.Empty) -> None:
        answer = messages.ServerMetadataResponse(name=oip.SERVER, version=oip.VERSION, extensions=list(oip.EXTENSIONS))
        self._respond(peer, exchange, answer)

    def _index(self, peer: Peer, exchange: GrpcExchange, request: messages.RepositoryIndexRequest) -> None:
        def done(cards: list[ModelCard]) -> None:
            models = [messages.ModelIndex(**oip.index_entry(card)) for card in cards]
            self._respond(peer, exchange, messages.RepositoryIndexResponse(models=models))

        self._inferences.index(peer, exchange, request.ready, done, lambda error: self._fail(peer, exchange, error))

    # -- models -----------------------------------------------------------------------------------------------------

    def _model_ready(self, peer: Peer, exchange: GrpcExchange, request: messages.ModelRequest) -> None:
        def fail(error: RemoraError) -> None:
            if isinstance(error, NotFoundError):  # what is not there is not ready: no fault of the call
                self._respond(peer, exchange, messages.ModelReadyResponse(ready=False))
            else:
                self._fail(peer, exchange, error, request.name)

        try:
            self._inferences.model(
                peer,
                exchange,
                request.name,
                request.version,
                lambda _card: self._respond(peer, exchange, messages.ModelReadyResponse(ready=True)),
                fail,
            )
        except NotFoundError as error:
            fail(error)

    def _metadata(self, peer: Peer, exchange: GrpcExchange, request: messages.ModelRequest) -> None:
        def done(card: ModelCard) -> None:
            assert card.spec is not None  # it was loaded for this
            answer = messages.ModelMetadataResponse(
                name=card.name,
                versions=[oip.MODEL_VERSION],
                platform=oip.platform(card),
                inputs=_tensor_metadata(card.spec.inputs),
                outputs=_tensor_metadata(card.spec.outputs),
            )
            self._respond(peer, exchange, answer)

        self._inferences.model(
            peer,
            exchange,
            request.name,
            request.version,
            done,
            lambda error: self._fail(peer, exchange, error, request.name),
        )

    # -- inference --------------------------------------------------------------------------------------------------

    def _infer(self, peer: Peer, exchange: GrpcExchange, request: messages.ModelInferRequest) -> None:
        for output in request.outputs:
            parameters = _parameters(output.parameters)
            oip_values.refuse_shared_memory(output.name, parameters)
            oip_values.refuse_classification(output.name, parameters)
        asked = oip.Inference(
            request.model_name,
            request.model_version,
            self._inputs(request),
            [output.name for output in request.outputs],
            oip_values.timeout_of(_parameters(request.parameters)),
        )

        def reply(answer: Answer) -> None:
            outputs = answer.result.outputs
            message = messages.ModelInferResponse(
                model_name=request.model_name,
                model_version=oip.MODEL_VERSION,
                id=request.id,
                outputs=[
                    messages.InferOutputTensor(
                        name=out.name, datatype=oip_values.DATATYPES[out.dtype], shape=list(out.shape)
                    )
                    for out in outputs
                ],
                raw_output_contents=[out.data for out in outputs],
            )
            self._respond(peer, exchange, message, answer.drop)

        self._inferences.infer(
            peer, exchange, asked, reply, lambda error: self._fail(peer, exchange, error, request.model_name)
        )

    def _inputs(self, request: messages.ModelInferRequest) -> list[TensorView]:
        operations.check_tensor_count(len(request.inputs))
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise InvalidArgumentError(
                f"{len(raw)} raw_input_contents were sent for {len(request.inputs)} inputs",
                fix="send one for each input, in the order of the inputs, or none",
            )
        tensors = []
        for index, given in enumerate(request.inputs):
            dtype = oip_values.dtype_of(given.name, given.datatype)
            oip_values.refuse_shared_memory(given.name, _parameters(given.parameters))
            if raw:
                if len(given.contents):
                    raise InvalidArgumentError(f"input {given.name[:40]!r} has both contents and raw_input_contents")
                data: bytes | memoryview = raw[index]
            else:
                oip_values.check_shape(given.name, given.shape)
                data = oip_values.pack_contents(
                    given.name, given.datatype, given.shape, given.contents, self._core.limits.json_bytes // 4
                )
            tensors.append(operations.tensor(given.name, dtype, given.shape, data))
        return tensors
