"""What was found in a picture, as each protocol says it: messages for the native door, a line of text for vAccel's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.core import Core
from remora.agent.sessions import Session
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.workers.contract import PICTURES, LabelScore


def timing(answer: Answer) -> v1.Timing:
    return v1.Timing(queue_us=answer.queue_us, run_us=answer.result.run_us)


def _labels(answer: Answer) -> Message:
    labels = [v1.Label(index=label.index, name=label.name, score=label.score) for label in answer.result.labels]
    return v1.ClassifyResponse(labels=labels, timing=timing(answer))


def _objects(answer: Answer) -> Message:
    objects = [
        v1.Detection(index=found.index, name=found.name, score=found.score, x1=x1, y1=y1, x2=x2, y2=y2)
        for found, (x1, y1, x2, y2) in ((label, label.place) for label in answer.result.labels)
    ]
    return v1.DetectResponse(objects=objects, timing=timing(answer))


def _points(answer: Answer) -> Message:
    points = [
        v1.Keypoint(index=found.index, name=found.name, score=found.score, x=x, y=y)
        for found, (x, y) in ((label, label.place) for label in answer.result.labels)
    ]
    return v1.PoseResponse(keypoints=points, timing=timing(answer))


def _map(answer: Answer) -> Message:
    (found,) = answer.result.outputs
    tensor = v1.Tensor(name=found.name, dtype=found.dtype, shape=list(found.shape), data=found.data)
    return v1.MapResponse(map=tensor, labels=[label.name for label in answer.result.labels], timing=timing(answer))


def default_operation(
    core: Core, session: Session, name: str, image: bytes | memoryview, deadline_s: float | None
) -> operations.Operation:
    """Return an operation on a picture for vAccel's callers, who name no model and count nothing."""
    model = core.models.default_for(session, PICTURES[name])
    return operations.picture(name, model, image, 1 if name == "classify" else 0, deadline_s=deadline_s)


#: Operation -> its native response.
RESPONSES: Mapping[str, Callable[[Answer], Message]] = {
    "classify": _labels,
    "detect": _objects,
    "segment": _map,
    "pose": _points,
    "depth": _map,
}


def _placed(label: LabelScore) -> str:
    return f"{label.name} {label.score:.2f} at {','.join(f'{number:.0f}' for number in label.place)}"


def _shares(answer: Answer) -> list[str]:
    counts = Counter(answer.result.outputs[0].data)
    total = max(1, counts.total())
    return [f"{label.name} {counts[label.index] / total:.1%}" for label in answer.result.labels if counts[label.index]]


def _range(answer: Answer) -> list[str]:
    (found,) = answer.result.outputs
    values = found.data.cast("f")
    return [f"{found.shape[1]}x{found.shape[0]} from {min(values):g} to {max(values):g}"]


_TEXTS: Mapping[str, Callable[[Answer], list[str]]] = {
    "classify": lambda answer: [label.name for label in answer.result.labels],
    "detect": lambda answer: [_placed(label) for label in answer.result.labels],
    "segment": _shares,
    "pose": lambda answer: [_placed(label) for label in answer.result.labels],
    "depth": _range,
}


def text_of(operation: str, answer: Answer, room: int) -> str:
    """Return what was found as one line: as many whole entries as `room` bytes hold with a NUL, at least the first."""
    line = ""
    for entry in _TEXTS[operation](answer):
        longer = f"{line}; {entry}" if line else entry
        if line and len(longer.encode()) >= room:
            break
        line = longer
    return line
