"""Weight files: arrays come out, programs do not run."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remora.catalog.weights import read_weights
from remora.errors import InvalidArgumentError

MAGIC = 0x1950A86A20F9469CFC6C


class _Global:
    """Pickles as a reference to `module.name`, called with arguments."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.target, self.arguments = f"c{module}\n{name}\n", arguments


#: The pickler written in Python: unlike the other, it lets a subclass write what it likes.
_Base: Any = pickle._Pickler  # type: ignore[attr-defined, unused-ignore]  # typeshed does not know it everywhere


class _Pickler(_Base):  # type: ignore[misc, unused-ignore]
    """Writes torch's globals and persistent ids without torch."""

    def persistent_id(self, obj: Any) -> Any:
        return obj if isinstance(obj, tuple) and obj and obj[0] == "storage" else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(obj.target.encode())
            if obj.arguments:
                super().save(obj.arguments)
                self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def legacy(tensors: dict[str, Any], storages: dict[str, bytes], counts: dict[str, int]) -> bytes:
    stream = io.BytesIO()
    for item in (MAGIC, 1001, {"little_endian": True}, OrderedDict(tensors), list(storages)):
        _Pickler(stream, 2).dump(item)
    for key, data in storages.items():
        stream.write(struct.pack("<q", counts[key]) + data)
    return stream.getvalue()


def tensor(count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Global:
    storage = ("storage", _Global("torch", "FloatStorage"), "7", "cpu", count, None)
    return _Global("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, OrderedDict())


def test_arrays_come_out_with_offset_and_strides() -> None:
    data = np.arange(10, dtype="<f4")
    made = legacy({"w": tensor(10, 2, (3, 2), (1, 3))}, {"7": data.tobytes()}, {"7": 10})
    assert read_weights(made)["w"].tolist() == [[2, 5], [3, 6], [4, 7]]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (11,), (1,)), (5, (6,), (1,)), (0, (2, 2), (1, 10)), (-1, (2,), (1,))]
)
def test_a_tensor_outside_its_storage_is_refused(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    made = legacy({"w": tensor(10, offset, shape, strides)}, {"7": bytes(40)}, {"7": 10})
    with pytest.raises(InvalidArgumentError, match=r"outside its storage|impossible shape"):
        read_weights(made)


def test_a_program_in_the_file_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    made = legacy({"w": _Global("os", "system", f"touch {mark}")}, {}, {})
    with pytest.raises(InvalidArgumentError, match=r"os\.system, which is not allowed"):
        read_weights(made)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_are_refused(name: str) -> None:
    made = legacy({"w": _Global("builtins", name, "1")}, {}, {})
    with pytest.raises(InvalidArgumentError, match="not allowed"):
        read_weights(made)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", os.urandom(256), pickle.dumps(MAGIC)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        read_weights(data)


def test_a_truncated_file_is_refused() -> None:
    made = legacy({"w": tensor(10, 0, (10,), (1,))}, {"7": bytes(40)}, {"7": 10})
    with pytest.raises(InvalidArgumentError, match="damaged"):
        read_weights(made[:-8])
