"""What each vAccel method and each opcode must do, as tables that any client can run: one row is one expectation.

A table is complete or its test fails: `test_every_method.py` compares the keys with the protocol's own lists.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Protocol

from PIL import Image

from remora.catalog import load_catalog

MODEL, BUFFER_BLOB = 2, 1
RAW, INT32, INT64, UINT8, FLOAT32, FLOAT32_ARRAY, UCHAR_ARRAY, STRING, BUFFER = 0, 5, 7, 9, 17, 18, 26, 27, 28
EPERM, EACCES, EINVAL, ENOTSUP = 1, 13, 22, 95
VALUE = struct.pack("<f", 1.5)
FLOAT = {"Torch": 7, "Tensorflow": 1, "TensorflowLite": 1}
PACKAGES = {"Torch": "torch", "Tensorflow": "tf", "TensorflowLite": "tflite"}


class Caller(Protocol):
    """A vAccel client. A failed call raises `vaccel_google.RemoteError`."""

    def call(self, method: str, *, raw: bytes | None = None, **values: Any) -> Any: ...

    def stream(self, messages: list[Any]) -> Any: ...

    def message(self, name: str, /, **values: Any) -> Any: ...

    def arg(self, data: bytes, kind: int, **values: Any) -> Any: ...


def picture() -> bytes:
    stream = BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Scene:
    """A session with a model, made by the client that is tested."""

    caller: Caller
    file: bytes

    def __post_init__(self) -> None:
        self.session = int(self.caller.call("CreateSession", flags=1).session_id)
        blob = self.caller.message("resource.Blob", type_=BUFFER_BLOB, name="m", data=self.file, size=len(self.file))
        answer = self.caller.call("RegisterResource", session_id=self.session, resource_type=MODEL, blobs=[blob])
        self.model = int(answer.resource_id)

    def run(self, prefix: str) -> Any:
        tensor = self.caller.message(f"{PACKAGES[prefix]}.Tensor", data=VALUE, dims=[1, 1, 1, 1], type=FLOAT[prefix])
        values: dict[str, Any] = {"nr_out_tensors": 1}
        if prefix == "Tensorflow":
            nodes = [self.caller.message("tf.Node", name=name) for name in ("input", "output")]
            values = {"in_nodes": nodes[:1], "out_nodes": nodes[1:]}
        return self.caller.call(
            f"{prefix}ModelRun", session_id=self.session, model_id=self.model, in_tensors=[tensor], **values
        )

    def genop(self, opcode: int, read: Sequence[Any], write: Sequence[Any]) -> list[bytes]:
        first = self.caller.arg(bytes([opcode]), UINT8)
        answer = self.caller.call("Genop", session_id=self.session, read_args=[first, *read], write_args=[*write])
        return [bytes(arg.buf) for arg in answer.write_args]


# -- every method succeeds --------------------------------------------------------------------------------------------


def _create(scene: Scene) -> None:
    assert scene.caller.call("CreateSession", flags=7).session_id not in (0, scene.session)


def _update(scene: Scene) -> None:
    scene.caller.call("UpdateSession", session_id=scene.session, flags=2)


def _destroy(scene: Scene) -> None:
    scene.caller.call("DestroySession", session_id=scene.session)


def _register(scene: Scene) -> None:
    again = scene.caller.call("RegisterResource", session_id=scene.session, resource_id=scene.model)
    assert again.resource_id == scene.model


def _unregister(scene: Scene) -> None:
    scene.caller.call("UnregisterResource", session_id=scene.session, resource_id=scene.model)


def _sync(scene: Scene) -> None:
    (blob,) = scene.caller.call("SyncResource", resource_id=scene.model).blobs
    assert (blob.data, blob.size) == (scene.file, len(scene.file))


def _classify(scene: Scene) -> None:
    tags = scene.caller.call("ImageClassification", session_id=scene.session, image=picture()).tags
    assert len(tags) == 1024
    assert tags.rstrip(b"\0")


def _load(prefix: str) -> Callable[[Scene], None]:
    return lambda scene: scene.caller.call(f"{prefix}ModelLoad", session_id=scene.session, model_id=scene.model)


def _unload(prefix: str) -> Callable[[Scene], None]:
    def unload(scene: Scene) -> None:
        _load(prefix)(scene)
        scene.caller.call(f"{prefix}ModelUnload", session_id=scene.session, model_id=scene.model)

    return unload


def _run(prefix: str) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        _load(prefix)(scene)
        assert [out.data for out in scene.run(prefix).out_tensors] == [VALUE]

    return run


def _genop(scene: Scene) -> None:
    assert scene.genop(18, [scene.caller.arg(b"data", RAW)], [scene.caller.arg(bytes(4), RAW)]) == [b"data"]


def _stream(scene: Scene) -> None:
    caller = scene.caller
    begin = caller.message("genop.Request", session_id=scene.session, read_args=[caller.arg(bytes([18]), UINT8)])
    halves = [
        caller.message("genop.Request", read_args=[caller.arg(half, RAW, size=4, parts=2, part_no=number)])
        for number, half in ((1, b"da"), (2, b"ta"))
    ]
    room = caller.message("genop.Request", write_args=[caller.arg(bytes(4), RAW)])
    assert [bytes(arg.buf) for arg in caller.stream([begin, *halves, room]).write_args] == [b"data"]


def _profile(scene: Scene) -> None:
    _genop(scene)
    profiler = scene.caller.call("GetProfiler", session_id=scene.session).profiler
    assert profiler.component_name == "vaccel-rpc-agent"
    assert "genop > sess.genop" in {entry.key for entry in profiler.regions}


SUCCESSES: Mapping[str, Callable[[Scene], None]] = {
    "CreateSession": _create,
    "UpdateSession": _update,
    "DestroySession": _destroy,
    "RegisterResource": _register,
    "UnregisterResource": _unregister,
    "SyncResource": _sync,
    "ImageClassification": _classify,
    "Genop": _genop,
    "GenopStream": _stream,
    "GetProfiler": _profile,
    **{f"{prefix}ModelLoad": _load(prefix) for prefix in PACKAGES},
    **{f"{prefix}ModelUnload": _unload(prefix) for prefix in ("Tensorflow", "TensorflowLite")},
    **{f"{prefix}ModelRun": _run(prefix) for prefix in PACKAGES},
}


# -- the status of each failure ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A request that must fail: ttrpc `code`; of the first detail `errno` and vAccel's error `kind` (None: bare)."""

    method: str
    case: str
    values: Callable[[Scene], dict[str, Any]]
    code: int
    errno: int | None = None
    kind: int | None = None

    def __str__(self) -> str:
        return f"{self.method}-{self.case}"


FFI, ARGUMENT, CONVERSION, WITH_STATUS = 0, 2, 6, 1
_OF_SESSION = tuple(name for name in SUCCESSES if name not in ("CreateSession", "SyncResource", "GetProfiler"))
_OF_RESOURCE = tuple(name for name in SUCCESSES if "Model" in name or name.endswith("Resource"))


def _plain(method: str, session: int, resource: int | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {} if method == "SyncResource" else {"session_id": session}
    if resource is not None:
        values["model_id" if "Model" in method else "resource_id"] = resource
    if method in ("TorchModelRun", "TensorflowLiteModelRun"):
        values["nr_out_tensors"] = 1
    return values


def _named(method: str, session: int, _scene: Scene) -> dict[str, Any]:
    return _plain(method, session)


def _own(method: str, resource: int, scene: Scene) -> dict[str, Any]:
    return _plain(method, scene.session, resource)


def _arguments(scene: Scene, size: int, kind: int) -> dict[str, Any]:
    opcode, wrong = scene.caller.arg(bytes([18]), UINT8), scene.caller.arg(bytes(4), kind, size=size)
    return {"session_id": scene.session, "read_args": [opcode, wrong], "write_args": [scene.caller.arg(bytes(4), RAW)]}


def _blob(scene: Scene, **values: Any) -> dict[str, Any]:
    blob = scene.caller.message("resource.Blob", **values)
    return {"session_id": scene.session, "resource_type": 1, "blobs": [blob]}


FAILURES: tuple[Failure, ...] = (
    *(Failure(name, "unknown session", partial(_named, name, 99), 5) for name in _OF_SESSION),
    *(Failure(name, "impossible session", partial(_named, name, -1), 13, 0, ARGUMENT) for name in _OF_SESSION),
    *(Failure(name, "unknown resource", partial(_own, name, 99), 5) for name in _OF_RESOURCE),
    *(Failure(name, "impossible resource", partial(_own, name, -1), 13, 0, ARGUMENT) for name in _OF_RESOURCE),
    Failure("RegisterResource", "nothing", lambda s: {"session_id": s.session, "resource_type": 1}, 3),
    Failure("RegisterResource", "paths", lambda s: {"session_id": s.session, "paths": ["/etc/passwd"]}, 7, EACCES, FFI),
    Failure("RegisterResource", "file blob", lambda s: _blob(s, type_=0, data=b"x"), 13, EINVAL, FFI),
    Failure("RegisterResource", "empty blob", lambda s: _blob(s, type_=1), 13, EINVAL, FFI),
    Failure("RegisterResource", "blob of no type", lambda s: _blob(s, type_=9, data=b"x"), 13, 0, CONVERSION),
    Failure("ImageClassification", "no picture", lambda s: {"session_id": s.session, "image": b"x"}, 13, EINVAL, FFI),
    Failure("ImageClassification", "nothing", lambda s: {"session_id": s.session}, 13, EINVAL, FFI),
    Failure("Genop", "no arguments", lambda s: {"session_id": s.session}, 13, EINVAL, FFI),
    Failure("Genop", "wrong size", lambda s: _arguments(s, 5, RAW), 13, 0, CONVERSION),
    Failure("Genop", "wrong type", lambda s: _arguments(s, 4, 30), 13, 0, CONVERSION),
    Failure("TorchModelRun", "not loaded", lambda s: _plain("TorchModelRun", s.session, s.model), 13, EINVAL, FFI),
)


# -- every opcode -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opcode:
    """Arguments for an opcode, and what comes of them: the written bytes, an errno, or a check of its own."""

    arguments: Callable[[Caller], tuple[list[Any], list[Any]]]
    outcome: list[bytes] | int | Callable[[list[bytes]], None]


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _sgemm(caller: Caller) -> tuple[list[Any], list[Any]]:
    two, one = caller.arg(struct.pack("<q", 2), INT64), caller.arg(_floats(1), FLOAT32)
    zero, eye = caller.arg(_floats(0), FLOAT32), caller.arg(_floats(1, 0, 0, 1), FLOAT32_ARRAY)
    matrix = caller.arg(_floats(1, 2, 3, 4), FLOAT32_ARRAY)
    return [two, two, two, one, matrix, two, eye, two, zero, two], [caller.arg(bytes(16), FLOAT32_ARRAY)]


def _minmax(caller: Caller) -> tuple[list[Any], list[Any]]:
    numbers = [caller.arg(struct.pack("<i", value), INT32) for value in (3, -9, 9)]
    data = caller.arg(struct.pack("<3d", 5, -2, 7), RAW)
    return [data, *numbers], [caller.arg(bytes(size), RAW) for size in (24, 8, 8)]


def _pair(outputs: int) -> Callable[[Caller], tuple[list[Any], list[Any]]]:
    return lambda caller: (
        [caller.arg(_floats(1, 2, 3, 4), RAW), caller.arg(_floats(1, 0, 0, 1), RAW)],
        [caller.arg(bytes(16), RAW)] * outputs,
    )


def _picture(caller: Caller) -> tuple[list[Any], list[Any]]:
    return [caller.arg(picture(), BUFFER)], [caller.arg(bytes(64), UCHAR_ARRAY)]


def _library(caller: Caller) -> tuple[list[Any], list[Any]]:
    names = [caller.arg(b"/lib/libc.so.6\0", STRING), caller.arg(b"abort\0", STRING)]
    return names, [caller.arg(bytes(4), RAW)]


def _resource(caller: Caller) -> tuple[list[Any], list[Any]]:
    return [caller.arg(struct.pack("<q", 1), INT64), caller.arg(b"abort\0", STRING)], [caller.arg(bytes(4), RAW)]


def _labelled(written: list[bytes]) -> None:
    assert written[0] == bytes(64)
    assert written[1].rstrip(b"\0")


def _within(written: list[bytes]) -> None:
    # Whole entries of text, as many as fit; what they say is tests/integration/workers/test_pictures.py's business.
    assert [len(part) for part in written] == [64]
    assert written[0].rstrip(b"\0").decode().isprintable()


def _served(task: str) -> Opcode:
    """An operation on pictures is answered where the catalogue has a model for it; some need npm to be built."""
    there = any(entry.source.task == task for entry in load_catalog().values())
    return Opcode(_picture, _within if there else ENOTSUP)


def _some(caller: Caller) -> tuple[list[Any], list[Any]]:
    return [caller.arg(bytes(4), RAW)], [caller.arg(bytes(4), RAW)]


OPCODES: Mapping[int, Opcode] = {
    0: Opcode(_some, EINVAL),
    1: Opcode(_library, EPERM),
    2: Opcode(_resource, EPERM),
    3: Opcode(lambda caller: (_picture(caller)[0], _picture(caller)[1] * 2), _labelled),
    4: _served("detection"),
    5: _served("segmentation"),
    6: _served("pose"),
    7: _served("depth"),
    **{number: Opcode(_some, ENOTSUP) for number in (*range(8, 17), 23)},
    17: Opcode(_sgemm, [_floats(1, 2, 3, 4)]),
    18: Opcode(_some, [bytes(4)]),
    19: Opcode(_pair(1), [_floats(1, 2, 3, 4)]),
    20: Opcode(_pair(2), [_floats(2, 2, 3, 5), _floats(1, 0, 0, 4)]),
    21: Opcode(_pair(1), [_floats(2, 2, 3, 5)]),
    22: Opcode(_minmax, [struct.pack("<3d", 5, -2, 7), struct.pack("<d", -2), struct.pack("<d", 7)]),
    24: Opcode(_some, EINVAL),
    255: Opcode(_some, EINVAL),
}
