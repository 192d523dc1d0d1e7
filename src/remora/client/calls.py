"""Between the caller's Python values and the wire's messages, for the blocking and the asyncio session alike."""

from __future__ import annotations

import os
import time

from remora.client import tensors, values
from remora.client.source import Source, read_picture
from remora.errors import InvalidArgumentError, RemoraError
from remora.wire import remora_v1 as v1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, List, Optional

#: What `classify` uses unless told otherwise; `remora models build` makes it.
DEFAULT_MODEL = "efficientnet-lite0"
#: For each call whose caller gives no deadline. Loading a large model on a busy host takes tens of seconds.
CALL_TIMEOUT_S = 60.0
#: For the first connection.
CONNECT_TIMEOUT_S = 10.0
#: For getting a lost connection back: an agent's restart or a microVM's move takes less.
RECONNECT_TIMEOUT_S = 30.0


def client_name() -> str:
    import remora

    return f"remora-python/{remora.__version__}"


def model_name(model: Any) -> str:  # str, Model or AsyncModel
    """Return the name of a model that is given by its name or by what `load` returned."""
    name = model if isinstance(model, str) else getattr(model, "name", None)
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(
            f"model={model!r} names no model", fix="pass a name of session.models(), or what session.load() returned"
        )
    return name


def new_request_id() -> int:
    """Return a key for one request, unique among all that this session ever sends.

    Counting is not enough: a microVM that is restored from a snapshot counts again what it counted before, and would
    get the answers of its other past. Its kernel's generator repeats itself, too, until it is reseeded, and the clock
    goes on from where it was; but no two pasts come here in the same nanosecond.
    """
    return (int.from_bytes(os.urandom(8), "little") ^ time.monotonic_ns()) or 1


def limit(deadline: Optional[float], default_s: float) -> float:
    """Return the time limit of a call, seconds."""
    if deadline is None:
        return default_s
    if not deadline > 0:
        raise InvalidArgumentError(f"deadline={deadline!r}: it is the time from now, in seconds, and must be above 0")
    return float(deadline)


def classify_request(image: Any, model: str, top: int) -> v1.ClassifyRequest:
    return v1.ClassifyRequest(
        model=model, image=read_picture(image), top=_most(top, "labels"), request_id=new_request_id()
    )


def picture_request(image: Any, model: Any, top: Optional[int] = None) -> v1.PictureRequest:
    """Return the request of an operation on a picture; `model` None or empty for the catalogue's first."""
    name = model_name(model) if model else ""
    most = 0 if top is None else _most(top, "objects")
    return v1.PictureRequest(model=name, image=read_picture(image), top=most, request_id=new_request_id())


def _most(top: int, what: str) -> int:
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= 0xFFFFFFFF:
        raise InvalidArgumentError(f"top={top!r}: it is how many {what} are wanted, and must be 1 or more")
    return top


def labels(answer: v1.ClassifyResponse) -> List[values.Label]:
    return [values.label(message) for message in answer.labels]


def objects(answer: v1.DetectResponse) -> List[values.Detection]:
    return [values.detection(message) for message in answer.objects]


def keypoints(answer: v1.PoseResponse) -> List[values.Keypoint]:
    return [values.keypoint(message) for message in answer.keypoints]


def segmentation(answer: v1.MapResponse, arrays: bool) -> values.Segmentation:
    return values.Segmentation(tuple(answer.labels), depth_map(answer, arrays))


def depth_map(answer: v1.MapResponse, arrays: bool) -> Any:  # Tensor, or numpy.ndarray
    return tensors.from_wire([answer.map or v1.Tensor()], arrays=arrays).popitem()[1]


def models(answer: v1.ModelsResponse) -> List[values.ModelInfo]:
    return [values.model_info(message) for message in answer.models]


def loaded(answer: v1.LoadModelResponse, name: str) -> values.ModelInfo:
    return values.model_info(answer.model or v1.ModelInfo(name=name))


def ping_request() -> v1.NoopRequest:
    # Without a request id: an answer that was kept would measure nothing.
    return v1.NoopRequest()


class Loaded:
    """A model that this session loaded, and what it takes to load it again."""

    __slots__ = ("name", "source", "format", "epoch")

    def __init__(self, name: str, source: Optional[Source], model_format: str, epoch: int) -> None:
        self.name = name
        #: None for a catalogue model: the agent has its bytes.
        self.source = source
        self.format = model_format
        #: `Continuity.epoch` in which the agent loaded it.
        self.epoch = epoch

    def request(self) -> v1.LoadModelRequest:
        return v1.LoadModelRequest(model=self.name, format=self.format)


class Upload:
    """Which chunk comes next. Sans-I/O: the session sends `requests()` in order and hands each answer to `answered`.

    An answer can move the upload back (the agent lost a part) or forward (another session of the tenant sends the same
    bytes); a round of chunks ends there and `requests` begins the next one.
    """

    #: Rounds without progress after which the upload has failed.
    MAX_IDLE_ROUNDS = 3

    def __init__(self, source: Source) -> None:
        self.source = source
        self.received_bytes = 0
        self.complete = False
        self._furthest = -1
        self._idle_rounds = 0
        self._last_error: Optional[RemoraError] = None

    def stat_request(self) -> v1.StatResourceRequest:
        return v1.StatResourceRequest(digest=self.source.digest)

    def stated(self, answer: v1.StatResourceResponse) -> None:
        """Take the agent's answer to `stat_request`: a round of chunks may begin."""
        self.complete = answer.complete
        self.received_bytes = answer.received_bytes
        if answer.received_bytes > self._furthest:
            self._furthest, self._idle_rounds = answer.received_bytes, 0
        else:
            self._idle_rounds += 1
        if not self.complete and self._idle_rounds > self.MAX_IDLE_ROUNDS:
            raise InvalidArgumentError(
                f"the upload of the model {self.source} does not get beyond byte {self.received_bytes}",
                fix="see the agent's log for why it refuses the chunks",
            ) from self._last_error

    def requests(self, chunk_bytes: int) -> Iterable[v1.PutResourceRequest]:
        for offset, data in self.source.chunks(self.received_bytes, chunk_bytes):
            yield v1.PutResourceRequest(
                digest=self.source.digest, offset=offset, total_bytes=self.source.size_bytes, data=data
            )

    def interrupted(self, error: RemoraError) -> None:
        """Take note of why a round ended early; `stated` tells it if there is no progress."""
        self._last_error = error

    def answered(self, answer: v1.PutResourceResponse) -> bool:
        """Take the answer to one of `requests`; return whether the agent has everything now."""
        self.complete = self.complete or answer.complete
        self.received_bytes = max(self.received_bytes, answer.received_bytes)
        return self.complete


def chunk_bytes(max_message_bytes: int) -> int:
    """Return the size of chunks for an agent that accepts messages of `max_message_bytes`."""
    # 1 KiB is more than the fields around the data take.
    return max(4096, min(v1.CHUNK_BYTES, max_message_bytes - 1024))
