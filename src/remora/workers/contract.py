"""What the agent may ask of workers, as values: the border between the agent's core and the processes that compute.

The agent sees a `Workers` (implemented by `workers.pool.WorkerPool`, and by a fake in the agent's unit tests). It never
sees a backend, and a worker never sees a session, a token or a socket. All calls are made from the reactor's thread
and none blocks; every `done` is called exactly once, from the reactor's thread, never from within the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from remora.errors import RemoraError

#: Operations on an encoded picture, and the task of the model that each one needs.
PICTURES: Mapping[str, str] = {
    "classify": "classification",
    "detect": "detection",
    "segment": "segmentation",
    "pose": "pose",
    "depth": "depth",
}
#: Of these, what answers with a map of the picture: its element type. The others answer with labels.
MAPS: Mapping[str, str] = {"segment": "uint8", "depth": "float32"}
#: Of the others, how many numbers say where in the picture a label is: a box, a point.
PLACE_NUMBERS: Mapping[str, int] = {"classify": 0, "detect": 4, "pose": 2}

#: Trust domain of catalogue models: one worker serves all tenants. Other domains are a tenant's name, and those of its
#: libraries.
SHARED = "shared"
#: Name, dtype, shape, offset and length of a tensor.
TensorPlace = tuple[str, str, tuple[int, ...], int, int]
#: Format of a shared library.
LIBRARY = "library"


def library_domain(tenant: str, key: str) -> str:
    """Return the trust domain of one library of a tenant: a worker for it alone, which may die of what it does."""
    return f"{tenant} {LIBRARY} {key}"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    #: A key of wire.remora_v1.DTYPES. Empty for any type and shape: the model's file does not say.
    dtype: str
    shape: tuple[int, ...]  # -1: any size


@dataclass(frozen=True)
class ModelSource:
    """A model file on the host, and how to use it."""

    key: str  # catalogue name or sha256:<hex>
    digest: str  # sha256:<hex> of the file
    path: Path  # opened by the launcher; the worker gets a descriptor
    format: str  # "onnx", "tflite", "torchscript", LIBRARY
    task: str = "tensor"  # "tensor", or one of PICTURES' tasks
    manifest: Mapping[str, Any] = field(default_factory=dict)  # preprocessing, labels, ... for catalogue models
    #: As the manifest declares them; empty where nobody did.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    #: Of a library: digest and file of the libraries that are loaded before it.
    needs: tuple[tuple[str, Path], ...] = ()

    def run_threads(self, most: int) -> int:
        """Return how many threads one run takes on a CPU: as the manifest says, and no more than there are."""
        return min(most, int(self.manifest.get("batching", {}).get("threads", 1)))


@dataclass(frozen=True)
class ModelSpec:
    """What a loaded model turned out to be."""

    key: str
    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: str  # "cpu", "cuda:0"
    #: What its worker grew by, or more where the backend knows of more.
    memory_bytes: int
    #: Backend and its version.
    backend: str = ""


@dataclass(frozen=True)
class Measurement:
    """What a worker measured of a model on samples."""

    #: Rows of a run -> microseconds.
    curve: Mapping[int, float]
    #: Threads that run it at once -> runs a second, one row each.
    threads: Mapping[int, float]
    #: The outputs of some rows do not depend on the others: requests may be joined.
    independent: bool
    #: What the worker has grown by since before the model was loaded.
    memory_bytes: int = 0


@dataclass(slots=True)  # never changed; frozen, the few made for a request would take a tenth of the agent's time
class TensorView:
    """A tensor whose bytes may lie in an arena (then they are not copied on their way to or from a worker)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview  # contiguous, format "B"
    offset: int = 0  # of an output in its arena or region, of a shared input in its region


class Region(Protocol):
    """Memory shared with one client (`arena.Region`)."""

    id: int
    fd: int
    size: int
    memory: memoryview
    tenant: str


@dataclass(slots=True)  # as `TensorView`
class Job:
    """One operation on one model for one tenant. Checked by the door; the worker checks it against the model."""

    operation: str  # "infer", "compute", "exec", "noop", or one of PICTURES
    domain: str  # SHARED, the tenant, or one of its libraries
    tenant: str  # whose arena outputs are written to
    model: str  # ModelSource.key, loaded before; for compute only a name for the queue
    inputs: tuple[TensorView, ...] = ()  # infer, compute, exec
    outputs: tuple[str, ...] = ()  # infer: names wanted, empty for all
    image: memoryview | None = None  # pictures: as encoded
    top: int = 5  # pictures that answer with labels: how many
    deadline_s: float | None = None  # on the monotonic clock
    function: str = ""  # compute: a key of backends.linalg.FUNCTIONS; exec: a symbol
    numbers: Mapping[str, float] = field(default_factory=dict)  # compute: its scalar arguments
    #: compute: what it writes, of exactly these shapes. exec: of at most these, and the last of `inputs` are what is in
    #: them before; an argument's name is "<vAccel's type>:<custom type>".
    results: tuple[TensorSpec, ...] = ()
    region: Region | None = None  # infer: where all inputs lie, if the client has put them into memory it shares
    place: tuple[int, int] = (0, 0)  # infer: offset and length of the client's place for outputs in the region


@dataclass(frozen=True)
class LabelScore:
    index: int
    name: str
    score: float
    #: Pixels of the upright picture: x1, y1, x2, y2 of an object, x, y of a point.
    place: tuple[float, ...] = ()


@dataclass(slots=True)
class Result:
    """A job's answer. `release` gives the memory of `outputs` back once they are sent; call it exactly once."""

    outputs: tuple[TensorView, ...] = ()
    labels: tuple[LabelScore, ...] = ()
    run_us: int = 0
    release: Callable[[], None] = lambda: None
    #: Of a job that shared its run with others: the whole run; `run_us` is its part.
    whole_us: int = 0
    #: Where the outputs lie if the client may write over them: good for one answer, not to be remembered.
    region: Region | None = None
    #: The outputs as the worker described them, relative to `start`: the same object for the same description.
    places: tuple[TensorPlace, ...] | None = None
    start: int = 0


@dataclass(frozen=True)
class WorkerInfo:
    id: str
    pid: int
    domain: str
    backend: str
    models: tuple[str, ...]
    busy: int  # jobs in flight
    restarts: int
    device: str
    memory_bytes: int


class Block(Protocol):
    """Part of a tenant's shared memory. Cleared before it is given out."""

    view: memoryview

    def release(self) -> None: ...


class JobHandle(Protocol):
    def cancel(self) -> None:
        """Give the job up: `done` gets a CancelledError. A job that does not stop in time costs the worker its life."""


class Workers(Protocol):
    """Supervised workers. A worker's death is not the caller's problem: jobs in flight are run again once by a new
    worker (operations are pure); a job that kills two workers gets an AbortedError that says so. What a library does is
    not known to be pure: its job is not run again."""

    #: Called with the trust domain and the reason when a worker that belonged to it has died.
    on_death: Callable[[str, str], None]
    #: What holds workers besides their namespaces, for the operator: "cgroups", "users".
    confinement: Mapping[str, str]

    def allocate(self, tenant: str, size_bytes: int) -> Block:
        """Return memory for an incoming message that the tenant's workers already map.

        Raises:
            ResourceExhaustedError: the tenant's arena is full (limit from settings).
        """

    def share(self, tenant: str, size_bytes: int) -> Region:
        """Make memory that a client and the workers that serve it map; `unshare` ends it.

        Raises:
            ResourceExhaustedError: the system gives no more.
        """

    def unshare(self, region: Region) -> None: ...

    def load(self, domain: str, source: ModelSource, done: Callable[[ModelSpec | RemoraError], None]) -> None:
        """Load a model into the domain's worker, starting one if needed; loading it twice is no work."""

    def unload(self, domain: str, key: str) -> None: ...

    def measure(
        self,
        domain: str,
        key: str,
        shapes: Sequence[Sequence[int]],
        most_rows: int,
        done: Callable[[Measurement | RemoraError], None],
    ) -> None:
        """Measure a loaded model beside its work, within `WorkerSettings.calibrate_ms`.

        Args:
            shapes: One row of each input, in the order of the model's spec, no size open.
        """

    def submit(self, job: Job, done: Callable[[Result | RemoraError], None]) -> JobHandle: ...

    def submit_together(
        self, jobs: Sequence[tuple[Job, Callable[[Result | RemoraError], None]]]
    ) -> Sequence[JobHandle]:
        """Run jobs of one domain, model and form as one where that is possible.

        Each has its own answer and its own end: one that fails, is cancelled or comes too late takes no other with it.
        """

    def slots(self, domain: str) -> int:
        """How many runs the domain's worker wants in flight at once: more only waits inside it."""

    def release_domain(self, domain: str) -> None:
        """End the workers of a tenant and its libraries, and free its arenas; or those of one library."""

    def workers(self) -> Sequence[WorkerInfo]: ...

    def close(self) -> None:
        """Kill all workers and free everything; `done` of whatever is in flight gets an UnavailableError."""
