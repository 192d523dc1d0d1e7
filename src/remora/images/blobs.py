"""Streams of compressed bytes with everything about them checked: size, digest, ratio, before anyone trusts them."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from remora.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from remora.images.layer import write_layer
from remora.images.limits import DEFAULT_LIMITS, Limits
from remora.images.tarstream import Readable

_CHUNK = 1 << 20
_GZIP, _ZSTD, _XZ, _BZIP2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"

#: Called with the bytes done so far; raise from it to give up.
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Blob:
    """A range of a file; `digest` is what its bytes must have, None when only its unpacked content has one."""

    path: Path
    offset: int
    size_bytes: int
    digest: str | None = None

    def read_small(self, limit_bytes: int, what: str) -> bytes:
        """Return all bytes of a small document, verified."""
        if self.size_bytes > limit_bytes:
            raise InvalidArgumentError(f"{what} has {self.size_bytes} bytes; {limit_bytes} are allowed")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size_bytes)
        if self.digest is not None:
            _compare(what, self.digest, hashlib.sha256(data).hexdigest())
        return data


class _Region:
    """Reads a range of a file."""

    def __init__(self, file: BinaryIO, offset: int, size_bytes: int) -> None:
        self._file = file
        self._left = size_bytes
        file.seek(offset)

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


class _Measured:
    """Passes a stream on, counting and hashing it."""

    def __init__(self, stream: Readable, on_bytes: OnBytes | None = None) -> None:
        self._stream = stream
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self.size_bytes += len(data)
        if self._on_bytes is not None:
            self._on_bytes(self.size_bytes)
        return data

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Gunzip:
    """Decompresses gzip, members in a row included, with bounded output per call."""

    def __init__(self, stream: Readable, head: bytes) -> None:
        self._stream = stream
        self._input = head
        self._inflate = zlib.decompressobj(wbits=31)
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            if not self._input:
                self._input = self._stream.read(_CHUNK)
                if not self._input:
                    raise InvalidArgumentError("the layer's gzip stream is cut off")
            try:
                data = self._inflate.decompress(self._input, size)
            except zlib.error as error:
                raise InvalidArgumentError(f"the layer's gzip stream is damaged: {error}") from error
            self._input = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._input = self._inflate.unused_data or self._stream.read(_CHUNK)
                self._inflate = zlib.decompressobj(wbits=31)
                # Zeros may pad the last member (gzip does the same); anything else must be one more.
                self._ended = not self._input.strip(b"\0")
            if data:
                return data
        return b""


class _Unzstd:
    """Decompresses with the `zstd` program (Python has it from 3.14 on), fed by a thread."""

    def __init__(self, stream: Readable, head: bytes) -> None:
        try:
            self._process = subprocess.Popen(
                ["zstd", "-dcq", "--memory=256MiB"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise FailedPreconditionError("a layer is compressed with zstd", fix="install the package zstd") from error
        assert self._process.stdin is not None  # asked for above
        assert self._process.stdout is not None
        self._sink, self._source = self._process.stdin, self._process.stdout
        self._failure: BaseException | None = None
        self._feeder = threading.Thread(target=self._feed, args=(stream, head), name="zstd-feeder", daemon=True)
        self._feeder.start()

    def _feed(self, stream: Readable, data: bytes) -> None:
        try:
            with self._sink:
                while data:
                    self._sink.write(data)
                    data = stream.read(_CHUNK)
        except BrokenPipeError:
            pass  # zstd gave up, and says why in its exit status
        except BaseException as error:  # noqa: BLE001 - handed to the reading thread, which raises it
            self._failure = error

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        if not data:
            self._feeder.join()
            if self._failure is not None:
                raise self._failure
            if self._process.wait() != 0:
                raise InvalidArgumentError("the layer's zstd stream is damaged or cut off")
        return data

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._feeder.join()
        self._source.close()


@contextmanager
def unpacked(stream: Readable, limits: Limits = DEFAULT_LIMITS) -> Iterator[Readable]:
    """Give the plain bytes of a gzip, zstd or uncompressed stream, told apart by their first bytes."""
    head = b""
    while len(head) < 6 and (more := stream.read(6 - len(head))):
        head += more
    with ExitStack() as stack:
        if head.startswith(_GZIP):
            yield _Bounded(_Gunzip(stream, head), stream, limits)
        elif head.startswith(_ZSTD):
            yield _Bounded(stack.enter_context(closing(_Unzstd(stream, head))), stream, limits)
        elif head.startswith((_XZ, _BZIP2)):
            raise InvalidArgumentError("the layer is compressed with xz or bzip2; allowed are gzip, zstd or none")
        else:
            yield _Bounded(_Prefixed(stream, head), stream, limits)


class _Prefixed:
    def __init__(self, stream: Readable, head: bytes) -> None:
        self._stream = stream
        self._head = head

    def read(self, size: int, /) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._stream.read(size)


class _Bounded:
    """Stops a stream that unpacks to more than the limits allow."""

    def __init__(self, stream: Readable, packed: Readable, limits: Limits) -> None:
        self._stream = stream
        self._packed = packed
        self._limits = limits
        self._size = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._size += len(data)
        packed = self._packed.size_bytes if isinstance(self._packed, _Measured) else self._size
        self._limits.check_unpacked(packed, self._size)
        return data


def convert_layer(
    blob: Blob, diff_id: str, out: BinaryIO, *, limits: Limits = DEFAULT_LIMITS, on_bytes: OnBytes | None = None
) -> int:
    """Write the layer in `blob` to `out` as EROFS and return its size; `diff_id` is the digest of its plain tar.

    Raises:
        DataLossError: the bytes have another digest than they are named by.
        InvalidArgumentError, ResourceExhaustedError: as `write_layer`.
    """
    with open(blob.path, "rb") as file:
        packed = _Measured(_Region(file, blob.offset, blob.size_bytes), on_bytes)
        with unpacked(packed, limits) as stream:
            plain = _Measured(stream)
            size = write_layer(plain, out, bytes.fromhex(diff_id.removeprefix("sha256:"))[:16], limits)
        while packed.read(_CHUNK):
            pass
    if blob.digest is not None:
        _compare("a layer", blob.digest, packed.hexdigest)
    _compare("the unpacked layer", diff_id, plain.hexdigest)
    return size


def copy_unpacked(source: Path, out: BinaryIO, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Write the plain bytes of `source` to `out` and return True, or return False when it is not compressed."""
    with open(source, "rb") as file:
        if not file.read(6).startswith((_GZIP, _ZSTD)):
            return False
        packed = _Measured(_Region(file, 0, source.stat().st_size))
        with unpacked(packed, limits) as stream:
            while data := stream.read(_CHUNK):
                out.write(data)
    out.flush()
    return True


def _compare(what: str, expected: str, hexdigest: str) -> None:
    if expected != f"sha256:{hexdigest}":
        raise DataLossError(
            f"{what} has the digest sha256:{hexdigest} instead of {expected}", fix="get the image again from its source"
        )
