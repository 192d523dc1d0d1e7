"""The asyncio session: the names of `session`, awaited.

It is no wrapper of the blocking one: there is no thread behind it, a thousand requests may be under way on its one
connection, and a task that is cancelled leaves the session as it was.
"""

from __future__ import annotations

import asyncio
import time

from remora.client import address as addresses
from remora.client import calls, tracing
from remora.client.aio_link import AsyncLink
from remora.client.calls import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, DEFAULT_MODEL, RECONNECT_TIMEOUT_S
from remora.client.continuity import Continuity
from remora.client.inference import Inference
from remora.client.source import Source
from remora.client.views import ModelView, SessionView
from remora.errors import FailedPreconditionError, NotFoundError, UnavailableError
from remora.wire import remora_v1 as v1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Awaitable, Callable, Dict, Generator, List, Mapping, Optional, Sequence, TypeVar

    from remora.client.values import Detection, Keypoint, Label, ModelInfo, Segmentation
    from remora.wire.ttrpc.core import Metadata

    Answer = TypeVar("Answer")


def connect(
    address: Optional[str] = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    call_timeout_s: float = CALL_TIMEOUT_S,
    reconnect_s: float = RECONNECT_TIMEOUT_S,
) -> Connecting:
    """Open a session: `async with connect() as session`, or `session = await connect()` and close it.

    Arguments and errors are those of `remora.connect`.
    """
    return Connecting(address, timeout_s, call_timeout_s, reconnect_s)


class Connecting:
    """A session that is about to be opened: by `await`, or by `async with`, which also closes it."""

    def __init__(self, address: Optional[str], timeout_s: float, call_timeout_s: float, reconnect_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._call_timeout_s = call_timeout_s
        self._reconnect_s = reconnect_s
        self._session: Optional[AsyncSession] = None

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._open()
        return self._session

    async def __aexit__(self, *_exception: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def _open(self) -> AsyncSession:
        places = addresses.candidates(self._address)
        link = AsyncLink(places, Continuity(calls.client_name()), reconnect_s=self._reconnect_s)
        await link.open(self._timeout_s)
        return AsyncSession(link, call_timeout_s=self._call_timeout_s)


class AsyncSession(SessionView):
    """An open session; `connect` makes it. For the tasks of one event loop.

    Methods, arguments, results and errors are those of `remora.Session`.
    """

    _link: AsyncLink

    def __init__(self, link: AsyncLink, *, call_timeout_s: float) -> None:
        self._link = link
        self._call_timeout_s = call_timeout_s
        self._loaded: Dict[str, calls.Loaded] = {}
        self._loading = asyncio.Lock()

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def classify(
        self,
        image: Any,
        model: str = DEFAULT_MODEL,
        top: int = 5,
        deadline: Optional[float] = None,
        *,
        traceparent: Optional[str] = None,
    ) -> List[Label]:
        """Return the best labels of a picture, best first; see `remora.Session.classify`."""
        name = calls.model_name(model)
        request = calls.classify_request(image, name, top)
        return calls.labels(await self._picture("Classify", request, v1.ClassifyResponse, deadline, traceparent))

    async def detect(
        self,
        image: Any,
        model: Any = None,
        top: Optional[int] = None,
        deadline: Optional[float] = None,
        *,
        traceparent: Optional[str] = None,
    ) -> List[Detection]:
        """Return the objects in a picture, best first; see `remora.Session.detect`."""
        request = calls.picture_request(image, model, top)
        return calls.objects(await self._picture("Detect", request, v1.DetectResponse, deadline, traceparent))

    async def pose(
        self, image: Any, model: Any = None, deadline: Optional[float] = None, *, traceparent: Optional[str] = None
    ) -> List[Keypoint]:
        """Return the points of the body of the person in a picture; see `remora.Session.pose`."""
        request = calls.picture_request(image, model)
        return calls.keypoints(await self._picture("Pose", request, v1.PoseResponse, deadline, traceparent))

    async def segment(
        self,
        image: Any,
        model: Any = None,
        deadline: Optional[float] = None,
        *,
        arrays: bool = False,
        traceparent: Optional[str] = None,
    ) -> Segmentation:
        """Return which label each place of a picture has; see `remora.Session.segment`."""
        request = calls.picture_request(image, model)
        return calls.segmentation(
            await self._picture("Segment", request, v1.MapResponse, deadline, traceparent), arrays
        )

    async def depth(
        self,
        image: Any,
        model: Any = None,
        deadline: Optional[float] = None,
        *,
        arrays: bool = False,
        traceparent: Optional[str] = None,
    ) -> Any:
        """Return the depth of each place of a picture; see `remora.Session.depth`."""
        request = calls.picture_request(image, model)
        return calls.depth_map(await self._picture("Depth", request, v1.MapResponse, deadline, traceparent), arrays)

    async def infer(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        outputs: Optional[Sequence[str]] = None,
        deadline: Optional[float] = None,
        *,
        arrays: Optional[bool] = None,
        traceparent: Optional[str] = None,
    ) -> Dict[str, Any]:
        """Run a model on tensors; see `remora.Session.infer`."""
        name = calls.model_name(model)
        request = Inference(name, inputs, outputs, calls.new_request_id())
        trace = tracing.metadata(traceparent)
        return await self._using(
            name, lambda left_s: self._link.infer(request, arrays, timeout_s=left_s, metadata=trace), deadline
        )

    async def load(self, source: Any, *, format: str = "", deadline: Optional[float] = None) -> AsyncModel:
        """Upload a model, unless the agent has it, and load it; see `remora.Session.load`."""
        # Hashing a model takes 1 ms per MB: not in the loop's thread.
        hashed = await asyncio.get_running_loop().run_in_executor(None, Source, source)
        loaded = calls.Loaded(hashed.digest, hashed, format, -1)
        async with self._loading:
            info = await self._load(loaded, calls.limit(deadline, self._call_timeout_s))
            self._loaded[loaded.name] = loaded
        return AsyncModel(self, info)

    async def model(self, name: str, *, deadline: Optional[float] = None) -> AsyncModel:
        """Load a model of the catalogue by its name, so that the first request does not wait for it."""
        loaded = calls.Loaded(name, None, "", -1)
        return AsyncModel(self, await self._load(loaded, calls.limit(deadline, self._call_timeout_s)))

    async def models(self) -> List[ModelInfo]:
        """Return the models that this session may use: the catalogue's and its own."""
        return calls.models(await self._call("Models", v1.Empty(), v1.ModelsResponse, self._call_timeout_s))

    async def ping(self) -> float:
        """Return the time of a round trip to the agent, seconds."""
        start_s = time.monotonic()
        await self._call("Noop", calls.ping_request(), v1.NoopResponse, self._call_timeout_s)
        return time.monotonic() - start_s

    async def close(self) -> None:
        """End the session. Harmless when repeated."""
        await self._link.close()
        self._loaded.clear()

    # -- what calls have in common ------------------------------------------------------------------------------------

    async def _picture(
        self, method: str, request: Any, response: Any, deadline: Optional[float], traceparent: Optional[str]
    ) -> Any:
        trace = tracing.metadata(traceparent)
        self._link.continuity.check_size(request.byte_size(), method)
        return await self._using(
            request.model, lambda left_s: self._call(method, request, response, left_s, trace), deadline
        )

    async def _call(
        self, method: str, request: Any, response: Any, timeout_s: float, metadata: Optional[Metadata] = None
    ) -> Any:
        return await self._link.call(method, request, response, timeout_s=timeout_s, metadata=metadata)

    async def _using(self, name: str, send: Callable[[float], Awaitable[Answer]], deadline: Optional[float]) -> Answer:
        """Send a request that needs a model; if the agent lost the model, give it back to it and send again."""
        end_s = time.monotonic() + calls.limit(deadline, self._call_timeout_s)
        loaded = self._loaded.get(name)
        if loaded is not None and loaded.epoch != self._link.continuity.epoch:
            await self._load_again(loaded, end_s)
        try:
            return await send(end_s - time.monotonic())
        except (NotFoundError, FailedPreconditionError):
            if loaded is None or self._loaded.get(name) is not loaded:
                raise
        await self._load_again(loaded, end_s, lost_epoch=loaded.epoch)
        return await send(end_s - time.monotonic())

    async def _load_again(self, loaded: calls.Loaded, end_s: float, *, lost_epoch: int = -1) -> None:
        async with self._loading:
            # Another task may have been faster; a model lost within an epoch is loaded again in any case.
            if loaded.epoch != self._link.continuity.epoch or loaded.epoch == lost_epoch:
                await self._load(loaded, max(end_s - time.monotonic(), 0.0))

    async def _load(self, loaded: calls.Loaded, timeout_s: float) -> ModelInfo:
        """Load a model, uploading it first where the agent has not its bytes."""
        epoch = self._link.continuity.epoch
        if loaded.source is not None:
            await self._provide(loaded, loaded.source, timeout_s)
        answer = await self._call("LoadModel", loaded.request(), v1.LoadModelResponse, timeout_s)
        # The epoch of before: if the session was lost in between, the model is loaded once too often, never too seldom.
        loaded.epoch = epoch
        return calls.loaded(answer, loaded.name)

    async def _provide(self, loaded: calls.Loaded, source: Source, timeout_s: float) -> None:
        upload = calls.Upload(source)
        again = loaded.epoch >= 0
        while True:
            upload.stated(await self._call("StatResource", upload.stat_request(), v1.StatResourceResponse, timeout_s))
            if upload.complete:
                return
            if again:
                await asyncio.get_running_loop().run_in_executor(None, source.check_unchanged)
                again = False
            chunks = upload.requests(calls.chunk_bytes(self._link.continuity.max_message_bytes))
            answers = self._link.call_each("PutResource", chunks, v1.PutResourceResponse, timeout_s=timeout_s)
            try:
                async for answer in answers:
                    if upload.answered(answer):
                        return
            except (FailedPreconditionError, UnavailableError) as error:
                # A gap (the agent lost what it had stored, another upload of the same bytes began anew) or a lost
                # connection: ask how far the agent is, and go on from there.
                upload.interrupted(error)
            finally:
                await answers.aclose()

    async def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        await self._call("UnloadModel", v1.UnloadModelRequest(model=name), v1.Empty, self._call_timeout_s)


class AsyncModel(ModelView):
    """A model that is loaded in a session."""

    def __init__(self, session: AsyncSession, info: ModelInfo) -> None:
        self._session = session
        self.info = info

    async def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Optional[Sequence[str]] = None,
        deadline: Optional[float] = None,
        *,
        arrays: Optional[bool] = None,
        traceparent: Optional[str] = None,
    ) -> Dict[str, Any]:
        """Run the model; see `remora.Session.infer`."""
        return await self._session.infer(self, inputs, outputs, deadline, arrays=arrays, traceparent=traceparent)

    async def unload(self) -> None:
        """Release the model. The uploaded bytes stay with the agent until it needs the room."""
        await self._session._unload(self.name)
