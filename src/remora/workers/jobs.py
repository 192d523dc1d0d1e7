"""A job on its way: the datagram it becomes, the memory it holds, and its one answer.

Where a job's tensors lie in its tenant's arena they go to the worker as offsets; where they don't they are copied in
once. The memory stays until the worker has let go of it (it answered or died): only then is `done` called, so a caller
may reuse what it passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from remora.errors import AbortedError, InvalidArgumentError, RemoraError
from remora.reactor import Timer
from remora.wire.remora_v1 import DTYPES
from remora.workers.arena import Arena, ArenaBlock, Region, RegionBlock, SharedMemory, aligned
from remora.workers.contract import (
    MAPS,
    PLACE_NUMBERS,
    Job,
    LabelScore,
    ModelSource,
    ModelSpec,
    Result,
    TensorSpec,
    TensorView,
)
from remora.workers.packed import pack_job, places_of
from remora.workers.protocol import MAX_MESSAGE_BYTES, Message, encode, labels_of, outputs_of

Done = Callable[[Result | RemoraError], None]
#: A ranking must fit into a datagram.
MOST_LABELS = 1000
#: Operations that need no loaded model.
MODELLESS = ("noop", "compute")
#: First guess for outputs whose size only running tells.
_GUESS_BYTES = 64 * 1024


class PendingJob:
    """A submitted job until it is answered."""

    __slots__ = (
        "id",
        "job",
        "done",
        "arena",
        "attempts",
        "error",
        "grace",
        "block",
        "form",
        "region",
        "sized",
        "_copies",
        "_wanted",
    )

    def __init__(self, job_id: int, job: Job, arena: Arena | None, done: Done) -> None:
        self.id = job_id
        self.job = job
        self.done: Done | None = done
        self.arena = arena
        self.attempts = 0
        #: Why it was given up; its worker has yet to let go.
        self.error: RemoraError | None = None
        self.grace: Timer | None = None
        self.block: ArenaBlock | RegionBlock | None = None
        #: The client's memory that its tensors lie in.
        self.region = job.region if isinstance(job.region, Region) else None
        #: What the size of a model's outputs depends on, as a rule.
        self.form = (job.model, job.outputs, tuple([tensor.shape for tensor in job.inputs]))
        #: True if the size of the outputs was known beforehand.
        self.sized = False
        self._copies: list[ArenaBlock] = []
        self._wanted: tuple[TensorSpec, ...] = ()

    # -- the way there ------------------------------------------------------------------------------------------------

    def datagram(self, spec: ModelSpec | None, number: int, guess_bytes: int) -> bytes:
        """Return the message for the worker; memory that it names is held from now on.

        Raises:
            InvalidArgumentError: the model has no such output, or the request is too long to describe.
            ResourceExhaustedError: the arena is full.
        """
        self._free_memory()
        self.sized = guess_bytes > 0
        if self.job.operation == "infer" and spec is not None and self.arena is not None:
            self._wanted = wanted_outputs(spec, self.job.outputs)
            self.block = self._output_block(guess_bytes)
            return _checked(self._packed(number, self.region or self.arena, self.block))
        message: Message = {"t": self.job.operation, "id": self.id}
        if self.job.operation in ("compute", "exec") and self.arena is not None:
            self._wanted, self.sized = self.job.results, True
            self.block = self.arena.allocate(declared_bytes(self._wanted))
            message.update(f=self.job.function, n=dict(self.job.numbers), a=self.arena.id, off=self.block.offset)
            message["m"] = number
            message["in"] = self._inputs()
            message["out"] = [[spec.name, spec.dtype, spec.shape] for spec in self._wanted]
        elif spec is not None and self.arena is not None:
            image = self.job.image or memoryview(b"")
            message.update(m=number, a=self.arena.id)
            message.update(image=[self._place(image), len(image)], top=min(self.job.top, MOST_LABELS))
            if self.job.operation in MAPS:
                self._wanted = (TensorSpec("map", MAPS[self.job.operation], (-1, -1)),)
                self.block = self.arena.allocate(guess_bytes or _GUESS_BYTES)
                message.update(b=self.block.arena.id, off=self.block.offset, len=self.block.size)
        return _checked(encode(message))

    def _packed(self, number: int, memory: SharedMemory, block: ArenaBlock | RegionBlock) -> bytes:
        inputs, shared = self.job.inputs, self.region is not None
        offsets = [one.offset for one in inputs] if shared else [self._place(one.data) for one in inputs]
        arenas, room = (memory.id, block.arena.id), (block.offset, block.size)
        return pack_job(self.id, number, arenas, room, inputs, offsets, self.job.outputs, shared=shared)

    def _output_block(self, guess_bytes: int) -> ArenaBlock | RegionBlock:
        assert self.arena is not None
        if self.region is not None and self.job.place[1]:
            return RegionBlock(self.region, *self.job.place)
        return self.arena.allocate(guess_bytes or declared_bytes(self._wanted) or _GUESS_BYTES)

    def _inputs(self) -> list[list[object]]:
        return [
            [tensor.name, tensor.dtype, tensor.shape, self._place(tensor.data), len(tensor.data)]
            for tensor in self.job.inputs
        ]

    def _place(self, view: memoryview) -> int:
        assert self.arena is not None
        offset = self.arena.locate(view)
        if offset is None:
            copy = self.arena.allocate(len(view))
            self._copies.append(copy)
            copy.view[:] = view
            offset = copy.offset
        return offset

    def grow(self, size_bytes: int) -> ArenaBlock:
        """Replace the block for outputs by a larger one, which must be free in the arena."""
        assert self.arena is not None
        larger = self.arena.allocate(size_bytes)
        if self.block is not None:
            self.block.release()
        self.block = larger
        return larger

    # -- the way back -------------------------------------------------------------------------------------------------

    def result(self, message: Message, source: ModelSource | None, run_us: int) -> Result:
        """Return the checked answer of a worker; the memory of outputs now belongs to the result.

        Raises:
            ProtocolError: the answer is impossible.
        """
        names: Sequence[str] = source.manifest.get("labels", ()) if source is not None else ()
        numbers = PLACE_NUMBERS.get(self.job.operation)
        if numbers is not None and source is not None:
            found = labels_of(message.get("labels"), len(names) or 1 << 31, max(1, self.job.top), numbers)
            return Result(
                labels=tuple(
                    LabelScore(index, names[index] if names else str(index), score, place)
                    for index, score, place in found
                ),
                run_us=run_us,
            )
        if self.job.operation != "noop" and self.block is not None:
            block, memory = self.block, self.block.arena.memory
            if "layout" in message:
                at, places = message["at"], places_of(message, self.job.model, self._wanted, block.offset, block.size)
            else:
                at, places = 0, outputs_of(message.get("out"), self._wanted, block.offset, block.size)
            views = tuple(
                TensorView(name, dtype, shape, memory[at + start : at + start + length], at + start)
                for name, dtype, shape, start, length in places
            )
            self.block = None
            region = self.region if isinstance(block, RegionBlock) else None
            labels: tuple[LabelScore, ...] = ()
            if self.job.operation in MAPS:
                labels = tuple(LabelScore(index, name, 0.0) for index, name in enumerate(names))
            return Result(views, labels, run_us, block.release, region=region, places=places, start=at)
        return Result(run_us=run_us)

    def finish(self, outcome: Result | RemoraError, later: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Answer the caller, once, and let go of everything else.

        The caller may do anything in its `done`, also end the domain: where that must not happen now, `later` makes
        the call.
        """
        done, self.done = self.done, None
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self._free_memory()
        if done is not None and later is not None:
            later(lambda: done(outcome))
        elif done is not None:
            done(outcome)

    def verdict(self, reason: str, *, blamed: bool) -> RemoraError | None:
        """Note the death of its worker; returns the error if the job is over with it."""
        if self.error is not None:
            return self.error
        if self.job.operation == "exec":
            text = f"the library's worker died while it ran {self.job.function}: {reason}"
            return AbortedError(text, fix="it was not run again: what a library did before may matter")
        self.attempts += blamed
        if self.attempts >= 2:
            return AbortedError(f"two workers died while they ran this job; the last one: {reason}")
        return None

    def _free_memory(self) -> None:
        if self.block is not None:
            self.block.release()
            self.block = None
        for copy in self._copies:
            copy.release()
        self._copies.clear()


def _checked(data: bytes) -> bytes:
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidArgumentError("the request has too many tensors, or too long names", fix="send fewer at once")
    return data


def wanted_outputs(spec: ModelSpec, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Return the outputs asked for, all when none is named."""
    if not names:
        return spec.outputs
    known = {output.name: output for output in spec.outputs}
    for name in names:
        if name not in known:
            raise InvalidArgumentError(f"model {spec.key} has no output {name!r}", fix=f"it has {', '.join(known)}")
    return tuple(known[name] for name in names)


def declared_bytes(outputs: Sequence[TensorSpec]) -> int:
    """Return the size of outputs with the room for alignment, 0 if a dimension is open."""
    total = 0
    for output in outputs:
        if not output.dtype or any(dim < 0 for dim in output.shape):
            return 0
        total += aligned(prod(output.shape) * DTYPES[output.dtype])
    return total
