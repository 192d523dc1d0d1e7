"""The Open Inference Protocol over REST: JSON, and tensors as the bytes behind it (`binary_tensor_data`).

Binary tensors are slices of the body, which lies in memory that the worker maps; they come back the same way. What a
stock client may ask that is not here is refused by its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.cards import ModelCard
from remora.agent.core import Core
from remora.agent.doors import oip, oip_values
from remora.agent.doors.calls import as_remora_error
from remora.agent.doors.oip_inputs import read_request
from remora.agent.peers import Peer
from remora.agent.web.exchange import ALLOCATE_BYTES, Piece
from remora.agent.web.http1 import JSON, Http1Exchange, error_headers
from remora.errors import InvalidArgumentError, NotFoundError, RemoraError, UnavailableError, UnimplementedError
from remora.workers.contract import TensorView

NAME = "oip_rest"
_OCTETS = "application/octet-stream"
_TENSORS_AT = "Inference-Header-Content-Length"
_NOT_OFFERED = {
    "config": "model_configuration",
    "stats": "statistics",
    "trace": "trace",
    "load": "loading by request (model_repository)",
    "unload": "unloading by request (model_repository)",
    "logging": "logging",
    "trace/setting": "trace",
    "systemsharedmemory": "system_shared_memory",
    "cudasharedmemory": "cuda_shared_memory",
    "generate": "generate",
    "generate_stream": "generate",
}

Handler = Callable[[Peer, Http1Exchange], None]
#: Reading or writing JSON for so long is on the house.
_FREE_S = 0.002


class RestDoor:
    """Answers the requests of the REST face."""

    def __init__(self, core: Core, inferences: oip.Inferences) -> None:
        self._core = core
        self._inferences = inferences
        self._fixed: dict[tuple[str, ...], tuple[str, str, Handler]] = {
            ("v2",): ("GET", "ServerMetadata", self._server),
            ("v2", "health", "live"): ("GET", "ServerLive", self._live),
            ("v2", "health", "ready"): ("GET", "ServerReady", self._ready),
            ("v2", "repository", "index"): ("POST", "RepositoryIndex", self._index),
        }

    def handle(self, peer: Peer, exchange: Http1Exchange) -> None:
        """Answer a request, now or later."""
        exchange.service, exchange.method = NAME, "unknown"
        try:
            verb, exchange.method, handler = self._route(exchange.path)
            if exchange.verb != verb:
                self._refuse_verb(peer, exchange, verb)
                return
            handler(peer, exchange)
        except Exception as error:  # noqa: BLE001 - the border of a request: every failure is answered and reported
            self._fail(peer, exchange, as_remora_error(self._core, error))

    # -- where a path leads -----------------------------------------------------------------------------------------

    def _route(self, path: tuple[str, ...]) -> tuple[str, str, Handler]:
        if len(path) > 1 and not path[-1]:
            path = path[:-1]
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if path[:2] == ("v2", "models") and len(path) > 2 and path[2:] != ("stats",):
            found = self._model_route(path[2:])
            if found is not None:
                return found
        self._check_offered(path)
        shown = "/".join(path)[:100]
        raise NotFoundError(f"there is nothing at /{shown}", fix="the paths are in docs/oip-openapi.yaml")

    def _model_route(self, path: tuple[str, ...]) -> tuple[str, str, Handler] | None:
        model, version, rest = path[0], "", path[1:]
        if len(rest) > 1 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
        if rest == ():
            return "GET", "ModelMetadata", lambda peer, exchange: self._metadata(peer, exchange, model, version)
        if rest == ("ready",):
            return "GET", "ModelReady", lambda peer, exchange: self._model_ready(peer, exchange, model, version)
        if rest == ("infer",):
            return "POST", "ModelInfer", lambda peer, exchange: self._infer(peer, exchange, model, version)
        return None

    @staticmethod
    def _check_offered(path: tuple[str, ...]) -> None:
        if path[:1] != ("v2",):
            return
        for part in (*path[1:2], "/".join(path[1:3]), *path[-1:]):
            if part in _NOT_OFFERED:
                raise UnimplementedError(
                    f"/{'/'.join(path)[:100]}: the extension {_NOT_OFFERED[part]} is not offered",
                    fix=f"offered are {', '.join(oip.EXTENSIONS)}",
                )

    def _refuse_verb(self, peer: Peer, exchange: Http1Exchange, verb: str) -> None:
        error = UnimplementedError(f"{exchange.verb} is not allowed here", fix=f"use {verb}")
        error.http_status = 405
        if exchange.fail(error, {"Allow": verb}):
            self._core.refused(NAME, exchange.method, peer, error)

    # -- answering --------------------------------------------------------------------------------------------------

    def _answer(self, peer: Peer, exchange: Http1Exchange, value: object) -> None:
        self._core.metrics.answered(NAME, exchange.method, peer.identity.tenant, "OK")
        exchange.respond(200, [json.dumps(value).encode()], headers={"Content-Type": JSON})

    def _fail(self, peer: Peer, exchange: Http1Exchange, error: RemoraError, model: str = "") -> None:
        if exchange.fail(error):
            self._core.refused(NAME, exchange.method, peer, error, model=model)

    # -- the server -------------------------------------------------------------------------------------------------

    def _server(self, peer: Peer, exchange: Http1Exchange) -> None:
        value = {"name": oip.SERVER, "version": oip.VERSION, "extensions": list(oip.EXTENSIONS)}
        self._answer(peer, exchange, value)

    def _live(self, peer: Peer, exchange: Http1Exchange) -> None:
        self._answer(peer, exchange, {"live": True})

    def _ready(self, peer: Peer, exchange: Http1Exchange) -> None:
        ready = self._inferences.ready()
        self._core.metrics.answered(NAME, exchange.method, peer.identity.tenant, "OK" if ready else "UNAVAILABLE")
        body = json.dumps({"live": True, "ready": ready}).encode()
        headers = {"Content-Type": JSON} if ready else error_headers(UnavailableError("not ready"))
        exchange.respond(200 if ready else 503, [body], headers=headers)

    def _index(self, peer: Peer, exchange: Http1Exchange) -> None:
        asked = oip_values.parse_json(exchange.body, self._core.limits.json_bytes) if len(exchange.body) else {}
        ready_only = asked.get("ready", False)
        if not isinstance(ready_only, bool):
            raise InvalidArgumentError("`ready` is not true or false")

        def done(cards: list[ModelCard]) -> None:
            self._answer(peer, exchange, [oip.index_entry(card) for card in cards])

        self._inferences.index(peer, exchange, ready_only, done, lambda error: self._fail(peer, exchange, error))

    # -- models -----------------------------------------------------------------------------------------------------

    def _metadata(self, peer: Peer, exchange: Http1Exchange, model: str, version: str) -> None:
        def done(card: ModelCard) -> None:
            assert card.spec is not None  # it was loaded for this
            value = {
                "name": card.name,
                "versions": [oip.MODEL_VERSION],
                "platform": oip.platform(card),
                "inputs": oip_values.metadata(card.spec.inputs),
                "outputs": oip_values.metadata(card.spec.outputs),
            }
            self._answer(peer, exchange, value)

        self._inferences.model(
            peer, exchange, model, version, done, lambda error: self._fail(peer, exchange, error, model)
        )

    def _model_ready(self, peer: Peer, exchange: Http1Exchange, model: str, version: str) -> None:
        self._inferences.model(
            peer,
            exchange,
            model,
            version,
            lambda card: self._answer(peer, exchange, {"name": card.name, "ready": True}),
            lambda error: self._fail(peer, exchange, error, model),
        )

    # -- inference --------------------------------------------------------------------------------------------------

    def _infer(self, peer: Peer, exchange: Http1Exchange, model: str, version: str) -> None:
        operations.check_model(model)
        began_s = time.monotonic()
        request = read_request(exchange, self._core.limits.json_bytes)
        self._charge(peer, began_s)
        asked = oip.Inference(model, version, request.inputs, request.outputs, request.timeout_s)

        def reply(answer: Answer) -> None:
            head: dict[str, Any] = {"model_name": model, "model_version": oip.MODEL_VERSION}
            if request.id is not None:
                head["id"] = request.id
            pieces: list[Piece] = []
            began_s = time.monotonic()
            left = self._core.limits.json_bytes
            head["outputs"] = outputs = []
            for tensor in answer.result.outputs:
                binary = request.wants_binary(tensor.name)
                outputs.append(self._output(tensor, pieces if binary else None, left))
                left -= 0 if binary else oip_values.json_length(tensor)
            text = json.dumps(head).encode()
            self._charge(peer, began_s)
            sent = self._held(peer, len(text), answer.drop)
            headers: Mapping[str, str] = {"Content-Type": JSON}
            if pieces:
                headers = {"Content-Type": _OCTETS, _TENSORS_AT: str(len(text))}
            self._core.metrics.answered(NAME, exchange.method, peer.identity.tenant, "OK")
            exchange.respond(200, [text, *pieces], headers=headers, on_sent=sent)

        self._inferences.infer(peer, exchange, asked, reply, lambda error: self._fail(peer, exchange, error, model))

    def _charge(self, peer: Peer, since_s: float) -> None:
        """Long text takes the agent's time, which everybody shares."""
        used_s = time.monotonic() - since_s
        if used_s > _FREE_S:
            self._core.charge(peer.identity.key, peer.identity.tenant, used_s)

    def _held(self, peer: Peer, size: int, on_sent: Callable[[], None]) -> Callable[[], None]:
        """Count a long text against what its tenant may have in flight until it is sent: its reader may be slow."""
        if size < ALLOCATE_BYTES:
            return on_sent
        release = self._core.peers.hold(peer.identity.tenant, size)

        def sent() -> None:
            release()
            on_sent()

        return sent

    def _output(self, tensor: TensorView, binary: list[Piece] | None, json_bytes: int) -> dict[str, Any]:
        """Return an output as JSON describes it; its bytes go into `binary`, if that is there."""
        datatype = oip_values.DATATYPES.get(tensor.dtype, tensor.dtype.upper())
        value: dict[str, Any] = {"name": tensor.name, "datatype": datatype, "shape": list(tensor.shape)}
        if binary is None:
            value["data"] = oip_values.unpack(tensor, json_bytes)
        else:
            value["parameters"] = {"binary_data_size": len(tensor.data)}
            binary.append(tensor.data)
        return value
