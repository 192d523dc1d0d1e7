"""The blocking session: what a function calls, in words of models, pictures and arrays.

A session is one object for a whole program: it is safe from many threads, its calls share one connection, and it
survives the connection, the agent and the microVM's being cloned. `aio` has the same names for asyncio.
"""

from __future__ import annotations

import threading
import time

from remora.client import address as addresses
from remora.client import calls, tracing
from remora.client.calls import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, DEFAULT_MODEL, RECONNECT_TIMEOUT_S
from remora.client.continuity import Continuity
from remora.client.inference import Inference
from remora.client.link import Link
from remora.client.source import Source
from remora.client.values import Detection, Keypoint, Label, ModelInfo, Segmentation
from remora.client.views import ModelView, SessionView
from remora.errors import FailedPreconditionError, NotFoundError, UnavailableError
from remora.wire import remora_v1 as v1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, TypeVar

    from remora.wire.ttrpc.core import Metadata

    Answer = TypeVar("Answer")


def connect(
    address: Optional[str] = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    call_timeout_s: float = CALL_TIMEOUT_S,
    reconnect_s: float = RECONNECT_TIMEOUT_S,
) -> Session:
    """Open a session with the agent. Use it as a context manager, or close it.

    Args:
        address: `unix:///path`, `unix://@name`, `vsock://cid:port` or `tcp://host:port` (loopback only). None for
            `REMORA_ADDRESS`, `VACCEL_RPC_ADDRESS`, or the default places (docs/sdk.md).
        timeout_s: For this connection.
        call_timeout_s: For each call that gets no deadline of its own.
        reconnect_s: How long a lost connection is sought before calls fail.

    Raises:
        UnavailableError: no agent answers; the message lists what was tried.
        InvalidArgumentError: the address is none.
    """
    link = Link(addresses.candidates(address), Continuity(calls.client_name()), reconnect_s=reconnect_s)
    try:
        link.open(timeout_s)
    except BaseException:
        link.close()
        raise
    return Session(link, call_timeout_s=call_timeout_s)


class Session(SessionView):
    """An open session; `remora.connect` makes it. All methods are safe from several threads.

    Every method may raise UnavailableError (the agent is gone and did not come back) and DeadlineExceededError.
    """

    _link: Link

    def __init__(self, link: Link, *, call_timeout_s: float) -> None:
        self._link = link
        self._call_timeout_s = call_timeout_s
        self._loaded: Dict[str, calls.Loaded] = {}
        self._loading = threading.Lock()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def classify(
        self,
        image: Any,
        model: str = DEFAULT_MODEL,
        top: int = 5,
        deadline: Optional[float] = None,
        *,
        traceparent: Optional[str] = None,
    ) -> List[Label]:
        """Return the best labels of a picture, best first.

        Args:
            image: An encoded picture (JPEG, PNG, WebP, GIF, BMP): bytes or another buffer, a path, or a file object
                that is open for reading bytes.
            model: A classification model of `models()`.
            top: How many labels.
            deadline: Seconds from now.
            traceparent: W3C trace context that the call belongs to; None for OpenTelemetry's current span, if any.

        Raises:
            InvalidArgumentError: the bytes are no picture, or the model is none for pictures.
            NotFoundError: no such model, or no such file.
        """
        name = calls.model_name(model)
        request = calls.classify_request(image, name, top)
        return calls.labels(self._picture("Classify", request, v1.ClassifyResponse, deadline, traceparent))

    def detect(
        self,
        image: Any,
        model: Any = None,
        top: Optional[int] = None,
        deadline: Optional[float] = None,
        *,
        traceparent: Optional[str] = None,
    ) -> List[Detection]:
        """Return the objects in a picture, best first.

        Args:
            image: As for `classify`.
            model: A detection model of `models()`; None for the catalogue's first.
            top: How many objects at most; None for all that the model is sure enough of.
            deadline: Seconds from now.

        Raises:
            InvalidArgumentError: the bytes are no picture, or the model is for something else.
            NotFoundError: no such model, or no such file.
            UnimplementedError: the catalogue has no model for this operation.
        """
        request = calls.picture_request(image, model, top)
        return calls.objects(self._picture("Detect", request, v1.DetectResponse, deadline, traceparent))

    def pose(
        self, image: Any, model: Any = None, deadline: Optional[float] = None, *, traceparent: Optional[str] = None
    ) -> List[Keypoint]:
        """Return the points of the body of the person in a picture, in the model's order. Arguments as for `detect`."""
        request = calls.picture_request(image, model)
        return calls.keypoints(self._picture("Pose", request, v1.PoseResponse, deadline, traceparent))

    def segment(
        self,
        image: Any,
        model: Any = None,
        deadline: Optional[float] = None,
        *,
        arrays: bool = False,
        traceparent: Optional[str] = None,
    ) -> Segmentation:
        """Return which label each place of a picture has. Arguments as for `detect`; `arrays` for a numpy array."""
        request = calls.picture_request(image, model)
        return calls.segmentation(self._picture("Segment", request, v1.MapResponse, deadline, traceparent), arrays)

    def depth(
        self,
        image: Any,
        model: Any = None,
        deadline: Optional[float] = None,
        *,
        arrays: bool = False,
        traceparent: Optional[str] = None,
    ) -> Any:
        """Return the depth of each place of a picture: float32 [height, width], a `Tensor` or numpy array.

        Arguments as for `detect`. The unit is the model's.
        """
        request = calls.picture_request(image, model)
        return calls.depth_map(self._picture("Depth", request, v1.MapResponse, deadline, traceparent), arrays)

    def infer(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        outputs: Optional[Sequence[str]] = None,
        deadline: Optional[float] = None,
        *,
        arrays: Optional[bool] = None,
        traceparent: Optional[str] = None,
    ) -> Dict[str, Any]:
        """Run a model on tensors.

        Args:
            model: Name of a model of `models()`, or a `Model`.
            inputs: Input name to numpy array, `Tensor`, or a typed buffer such as `array.array`. None of them is
                copied; they must not change until the call returns.
            outputs: Names of the outputs that are wanted; None for all.
            deadline: Seconds from now.
            arrays: True for numpy arrays as results (numpy is imported), False for `Tensor`s. None for what was
                passed: numpy arrays if at least one input is one, else `Tensor`s.
            traceparent: As for `classify`.

        Returns:
            Output name to array.

        Raises:
            InvalidArgumentError: names, types or shapes are not those of the model.
            NotFoundError: no such model.
        """
        name = calls.model_name(model)
        request = Inference(name, inputs, outputs, calls.new_request_id())
        trace = tracing.metadata(traceparent)
        return self._using(
            name, lambda left_s: self._link.infer(request, arrays, timeout_s=left_s, metadata=trace), deadline
        )

    def load(self, source: Any, *, format: str = "", deadline: Optional[float] = None) -> Model:
        """Upload a model, unless the agent has it, and load it.

        Args:
            source: Path of the model file, or its bytes. Bytes are kept, not copied, until `Model.unload`: a new
                agent may need them again.
            format: `onnx`; empty to recognise it.
            deadline: Seconds from now, for each message; the upload as a whole has no limit but progress.

        Raises:
            ResourceExhaustedError: the model is larger than policy allows.
            InvalidArgumentError: it is no model of a known format.
        """
        source = Source(source)
        loaded = calls.Loaded(source.digest, source, format, -1)
        with self._loading:
            info = self._load(loaded, calls.limit(deadline, self._call_timeout_s))
            self._loaded[loaded.name] = loaded
        return Model(self, info)

    def model(self, name: str, *, deadline: Optional[float] = None) -> Model:
        """Load a model of the catalogue by its name, so that the first request does not wait for it.

        Raises:
            NotFoundError: the catalogue has no such model.
        """
        loaded = calls.Loaded(name, None, "", -1)
        return Model(self, self._load(loaded, calls.limit(deadline, self._call_timeout_s)))

    def models(self) -> List[ModelInfo]:
        """Return the models that this session may use: the catalogue's and its own."""
        return calls.models(self._call("Models", v1.Empty(), v1.ModelsResponse, self._call_timeout_s))

    def ping(self) -> float:
        """Return the time of a round trip to the agent, seconds."""
        start_s = time.monotonic()
        self._call("Noop", calls.ping_request(), v1.NoopResponse, self._call_timeout_s)
        return time.monotonic() - start_s

    def close(self) -> None:
        """End the session. Harmless when repeated."""
        self._link.close()
        self._loaded.clear()

    # -- what calls have in common ------------------------------------------------------------------------------------

    def _picture(
        self, method: str, request: Any, response: Any, deadline: Optional[float], traceparent: Optional[str]
    ) -> Any:
        trace = tracing.metadata(traceparent)
        self._link.continuity.check_size(request.byte_size(), method)
        return self._using(request.model, lambda left_s: self._call(method, request, response, left_s, trace), deadline)

    def _call(
        self, method: str, request: Any, response: Any, timeout_s: float, metadata: Optional[Metadata] = None
    ) -> Any:
        return self._link.call(method, request, response, timeout_s=timeout_s, metadata=metadata)

    def _using(self, name: str, send: Callable[[float], Answer], deadline: Optional[float]) -> Answer:
        """Send a request that needs a model; if the agent lost the model, give it back to it and send again."""
        end_s = time.monotonic() + calls.limit(deadline, self._call_timeout_s)
        loaded = self._loaded.get(name)
        if loaded is not None and loaded.epoch != self._link.continuity.epoch:
            self._load_again(loaded, end_s)
        try:
            return send(end_s - time.monotonic())
        except (NotFoundError, FailedPreconditionError):
            if loaded is None or self._loaded.get(name) is not loaded:
                raise
        self._load_again(loaded, end_s, lost_epoch=loaded.epoch)
        return send(end_s - time.monotonic())

    def _load_again(self, loaded: calls.Loaded, end_s: float, *, lost_epoch: int = -1) -> None:
        with self._loading:
            # Another thread may have been faster; a model lost within an epoch is loaded again in any case.
            if loaded.epoch != self._link.continuity.epoch or loaded.epoch == lost_epoch:
                self._load(loaded, max(end_s - time.monotonic(), 0.0))

    def _load(self, loaded: calls.Loaded, timeout_s: float) -> ModelInfo:
        """Load a model, uploading it first where the agent has not its bytes."""
        epoch = self._link.continuity.epoch
        if loaded.source is not None:
            self._provide(loaded, loaded.source, timeout_s)
        answer = self._call("LoadModel", loaded.request(), v1.LoadModelResponse, timeout_s)
        # The epoch of before: if the session was lost in between, the model is loaded once too often, never too seldom.
        loaded.epoch = epoch
        return calls.loaded(answer, loaded.name)

    def _provide(self, loaded: calls.Loaded, source: Source, timeout_s: float) -> None:
        upload = calls.Upload(source)
        again = loaded.epoch >= 0
        while True:
            upload.stated(self._call("StatResource", upload.stat_request(), v1.StatResourceResponse, timeout_s))
            if upload.complete:
                return
            if again:
                source.check_unchanged()
                again = False
            chunks = upload.requests(calls.chunk_bytes(self._link.continuity.max_message_bytes))
            try:
                for answer in self._link.call_each("PutResource", chunks, v1.PutResourceResponse, timeout_s=timeout_s):
                    if upload.answered(answer):
                        return
            except (FailedPreconditionError, UnavailableError) as error:
                # A gap (the agent lost what it had stored, another upload of the same bytes began anew) or a lost
                # connection: ask how far the agent is, and go on from there.
                upload.interrupted(error)

    def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._call("UnloadModel", v1.UnloadModelRequest(model=name), v1.Empty, self._call_timeout_s)


class Model(ModelView):
    """A model that is loaded in a session."""

    def __init__(self, session: Session, info: ModelInfo) -> None:
        self._session = session
        self.info = info

    def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Optional[Sequence[str]] = None,
        deadline: Optional[float] = None,
        *,
        arrays: Optional[bool] = None,
        traceparent: Optional[str] = None,
    ) -> Dict[str, Any]:
        """Run the model; see `Session.infer`."""
        return self._session.infer(self, inputs, outputs, deadline, arrays=arrays, traceparent=traceparent)

    def unload(self) -> None:
        """Release the model. The uploaded bytes stay with the agent until it needs the room."""
        self._session._unload(self.name)
