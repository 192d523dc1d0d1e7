"""vAccel's model services: load, run and unload for PyTorch, TensorFlow and TensorFlow Lite.

The name of the method says how a request is laid out, and nothing of what runs it: the model file's own format chooses
the backend, so that an ONNX model works through each of them. What a guest uploaded runs in that guest's own worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.bundles import Bundle, Bundles
from remora.agent.cards import ModelCard
from remora.agent.doors import vaccel_tensors as tensors
from remora.agent.doors.vaccel_replies import EMPTY, BareError, Replies, bad_value, with_errno, with_status
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
)
from remora.wire import vaccel
from remora.wire.protobuf import Message
from remora.wire.ttrpc.calls import Call
from remora.workers.contract import ModelSpec, TensorSpec, TensorView

_EPERM = 1
_OK = vaccel.Status

Method = Callable[[Peer, Call, Any], None]
Respond = Callable[[Sequence[TensorView]], Message]


class ModelCalls:
    """Answers the eight methods."""

    def __init__(self, replies: Replies, bundles: Bundles) -> None:
        self._replies = replies
        self._core = replies.core
        self._bundles = bundles
        self.methods: Mapping[str, Method] = {
            "TorchModelLoad": self._load(lambda: EMPTY),
            "TorchModelRun": self._run_torch,
            "TensorflowModelLoad": self._load(lambda: vaccel.TfModelLoadResponse(status=_OK()), with_status),
            "TensorflowModelUnload": self._unload(lambda: vaccel.TfModelUnloadResponse(status=_OK()), with_status),
            "TensorflowModelRun": self._run_tf,
            "TensorflowLiteModelLoad": self._load(lambda: EMPTY),
            "TensorflowLiteModelUnload": self._unload(lambda: EMPTY),
            "TensorflowLiteModelRun": self._run_tflite,
        }

    # -- which model ------------------------------------------------------------------------------------------------

    def _model(self, peer: Peer, request: Any) -> tuple[Session, str]:
        """Return the session and the digest of the model that a request names.

        Raises:
            BareError: the session or the resource is unknown.
            RemoraError: the resource is no model (EINVAL) or not registered with the session (EPERM).
        """
        session = self._replies.session(peer, request.session_id)
        if request.model_id <= 0:
            raise bad_value(f"Invalid model id {request.model_id}", vaccel.ErrorType.INVALID_ARGUMENT)
        try:
            bundle = self._bundles.find(session.tenant, request.model_id)
        except NotFoundError as error:
            raise BareError(error) from error
        self._check(session, bundle)
        return session, bundle.digests[0]

    @staticmethod
    def _check(session: Session, bundle: Bundle) -> None:
        if bundle.kind != vaccel.ResourceType.MODEL:
            raise InvalidArgumentError(
                f"resource {bundle.id} is not a model", fix="register it with the resource type MODEL"
            )
        if session.id not in bundle.sessions:
            text = f"resource {bundle.id} is not registered with session {session.number}"
            raise with_errno(PermissionDeniedError(text, fix="register it with this session first"), _EPERM)
        if len(bundle.digests) != 1:
            raise InvalidArgumentError(
                f"model {bundle.id} consists of {len(bundle.digests)} files; models of one file are served here",
                fix="convert it to a single .onnx file (a TensorFlow SavedModel: with tf2onnx)",
            )

    def _load(
        self, answer: Callable[[], Message], explain: Callable[[RemoraError], RemoraError] = with_errno
    ) -> Method:
        def load(peer: Peer, call: Call, request: Any) -> None:
            session, digest = self._model(peer, request)

            def loaded(outcome: ModelCard | RemoraError) -> None:
                if isinstance(outcome, RemoraError):
                    self._replies.fail(peer, call, explain(outcome))
                else:
                    self._replies.respond(peer, call, answer())

            self._core.models.load(session, digest, "", loaded)

        return load

    def _unload(
        self, answer: Callable[[], Message], explain: Callable[[RemoraError], RemoraError] = with_errno
    ) -> Method:
        def unload(peer: Peer, call: Call, request: Any) -> None:
            session, digest = self._model(peer, request)
            if digest not in (session.models or ()):
                raise explain(self._not_loaded(request.model_id))
            self._core.models.unload(session, digest)
            self._replies.respond(peer, call, answer())

        return unload

    @staticmethod
    def _not_loaded(number: int) -> RemoraError:
        return FailedPreconditionError(f"model {number} is not loaded in this session", fix="load it first")

    # -- running ----------------------------------------------------------------------------------------------------

    def _run(
        self,
        peer: Peer,
        call: Call,
        request: Any,
        prepare: Callable[[ModelSpec], tuple[list[TensorView], list[str]]],
        answer: Respond,
        explain: Callable[[RemoraError], RemoraError] = with_errno,
    ) -> None:
        """Run a model: `prepare` fits the request to what the model turned out to be."""
        operations.check_tensor_count(len(request.in_tensors))
        session, digest = self._model(peer, request)
        if digest not in (session.models or ()):
            raise explain(self._not_loaded(request.model_id))
        deadline_s = self._core.deadline_s(call.deadline_s)

        def failed(error: RemoraError) -> None:
            self._replies.fail(peer, call, explain(error), digest)

        def ready(spec: ModelSpec | RemoraError) -> None:
            if call.ended:  # the request's memory may be gone
                return
            try:
                if isinstance(spec, RemoraError):
                    raise spec
                inputs, outputs = prepare(spec)
                operation = operations.infer(digest, inputs, outputs, deadline_s=deadline_s)
                self._replies.run(peer, call, session, operation, reply, failed)
            except RemoraError as error:
                failed(error)

        def reply(done: Answer) -> None:
            self._replies.respond(peer, call, answer(done.result.outputs), done.drop)

        self._core.models.ensure(session, digest, ready)

    def _run_torch(self, peer: Peer, call: Call, request: vaccel.TorchModelRunRequest) -> None:
        if not request.nr_out_tensors:
            raise bad_value("Invalid number of output tensors 0", vaccel.ErrorType.INVALID_ARGUMENT)

        def prepare(spec: ModelSpec) -> tuple[list[TensorView], list[str]]:
            return _by_position(spec, request.in_tensors, request.nr_out_tensors, tensors.TORCH)

        def answer(outputs: Sequence[TensorView]) -> Message:
            return vaccel.TorchModelRunResponse(out_tensors=tensors.written(outputs, tensors.TORCH, vaccel.TorchTensor))

        self._run(peer, call, request, prepare, answer)

    def _run_tflite(self, peer: Peer, call: Call, request: vaccel.TfliteModelRunRequest) -> None:
        def prepare(spec: ModelSpec) -> tuple[list[TensorView], list[str]]:
            return _by_position(spec, request.in_tensors, request.nr_out_tensors, tensors.TFLITE)

        def answer(outputs: Sequence[TensorView]) -> Message:
            out = tensors.written(outputs, tensors.TFLITE, vaccel.TfliteTensor)
            return vaccel.TfliteModelRunResponse(out_tensors=out, status=_OK())

        self._run(peer, call, request, prepare, answer, with_status)

    def _run_tf(self, peer: Peer, call: Call, request: vaccel.TfModelRunRequest) -> None:
        if len(request.in_nodes) != len(request.in_tensors):
            raise with_errno(
                InvalidArgumentError(f"{len(request.in_nodes)} input nodes for {len(request.in_tensors)} tensors")
            )

        def prepare(spec: ModelSpec) -> tuple[list[TensorView], list[str]]:
            if not request.out_nodes:
                raise InvalidArgumentError("no output node was asked for", fix="name at least one")
            names = [_of_node(node, spec.inputs, "input") for node in request.in_nodes]
            outputs = [_of_node(node, spec.outputs, "output") for node in request.out_nodes]
            return tensors.read(request.in_tensors, names, tensors.TF), outputs

        def answer(outputs: Sequence[TensorView]) -> Message:
            out = tensors.written(outputs, tensors.TF, vaccel.TfTensor)
            return vaccel.TfModelRunResponse(out_tensors=out, status=_OK())

        self._run(peer, call, request, prepare, answer, with_status)


def _by_position(
    spec: ModelSpec, given: Sequence[Any], count: int, types: Mapping[int, str]
) -> tuple[list[TensorView], list[str]]:
    """PyTorch and TensorFlow Lite name nothing: the n-th tensor is the model's n-th input, the outputs its first."""
    if len(given) != len(spec.inputs):
        raise InvalidArgumentError(
            f"{len(given)} input tensors were sent", fix=f"the model takes {_listed(spec.inputs)}, in this order"
        )
    if not 1 <= count <= len(spec.outputs):
        raise InvalidArgumentError(
            f"{count} output tensors were asked for", fix=f"the model has {_listed(spec.outputs)}"
        )
    inputs = tensors.read(given, [known.name for known in spec.inputs], types)
    return inputs, [known.name for known in spec.outputs[:count]]


def _of_node(node: vaccel.TfNode, specs: Sequence[TensorSpec], what: str) -> str:
    """Return the tensor of an operation's n-th output: `name:n`, as TensorFlow writes it, or plainly `name`."""
    names = [spec.name for spec in specs]
    for name in (f"{node.name}:{node.id}", node.name):
        if name in names:
            return name
    raise InvalidArgumentError(f"the model has no {what} {node.name!r}:{node.id}", fix=f"it has {', '.join(names)}")


def _listed(specs: Sequence[TensorSpec]) -> str:
    return f"{len(specs)}: " + ", ".join(f"{spec.name} ({spec.dtype})" for spec in specs)
