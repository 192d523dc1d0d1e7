"""Bytes to upload, that can be read again: after a lost agent the same model may have to be sent once more.

Nothing is read whole: a model larger than the guest's memory is hashed and sent in pieces. What is sent again is
checked against the first digest, because a file can have been replaced in the meantime.
"""

from __future__ import annotations

import os

from remora.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Tuple, Union

#: Read size for hashing: large enough that the loop costs nothing, small enough for a guest.
_HASH_BYTES = 1 << 20


class Source:
    """A model's bytes: a file by its path, or a buffer of the caller's (kept until the model is unloaded)."""

    def __init__(self, origin: Any) -> None:
        if isinstance(origin, (str, os.PathLike)):
            self._path = os.path.abspath(os.fspath(origin))
            self._buffer = None
            try:
                self.size_bytes = os.stat(self._path).st_size
            except FileNotFoundError as error:
                raise NotFoundError(f"the model file {self._path} does not exist", fix="check the path") from error
        else:
            self._path = ""
            try:
                view = memoryview(origin)
            except TypeError as error:
                raise InvalidArgumentError(
                    f"a model cannot come from a {type(origin).__name__}", fix="pass a path or the file's bytes"
                ) from error
            if not view.c_contiguous:
                raise InvalidArgumentError("the model's buffer is not contiguous", fix="copy it first: bytes(view)")
            self._buffer = view.cast("B") if view.nbytes else memoryview(b"")
            self.size_bytes = view.nbytes
        if self.size_bytes == 0:
            raise InvalidArgumentError(f"the model {self} is empty", fix="pass a model file, such as ONNX")
        try:
            self.digest = self._hash()
        except OSError as error:
            raise InvalidArgumentError(
                f"the model file {self._path} cannot be read: {error.strerror}", fix="pass the path of a readable file"
            ) from error

    def __str__(self) -> str:
        return self._path or f"of {self.size_bytes} bytes in memory"

    def check_unchanged(self) -> None:
        """Raise unless the bytes still have the digest under which they were first sent.

        Raises:
            FailedPreconditionError: the file or buffer has changed or is gone, and the agent has no copy.
        """
        try:
            same = self._hash() == self.digest
        except AbortedError:
            same = False  # it is shorter now
        except OSError as error:
            raise FailedPreconditionError(
                f"the agent needs the model {self} again, and it cannot be read any more: {error}",
                fix="load the model again",
            ) from error
        if not same:
            raise FailedPreconditionError(
                f"the agent needs the model {self} again, and it has changed since it was loaded",
                fix="load the model again",
            )

    def chunks(self, start: int, chunk_bytes: int) -> Iterator[Tuple[int, Union[bytes, memoryview]]]:
        """Yield (offset, bytes) from `start` to the end."""
        if self._buffer is not None:
            for offset in range(start, self.size_bytes, chunk_bytes):
                yield offset, self._buffer[offset : offset + chunk_bytes]
            return
        with open(self._path, "rb", buffering=0) as file:
            offset = start
            while offset < self.size_bytes:
                piece = os.pread(file.fileno(), min(chunk_bytes, self.size_bytes - offset), offset)
                if not piece:
                    raise AbortedError(f"the model file {self._path} was cut short while it was sent")
                yield offset, piece
                offset += len(piece)

    def _hash(self) -> str:
        import hashlib  # loads OpenSSL: only uploads pay for it

        sha256 = hashlib.sha256()
        for _offset, piece in self.chunks(0, _HASH_BYTES):
            sha256.update(piece)
        return f"sha256:{sha256.hexdigest()}"


def read_picture(image: Any) -> Union[bytes, memoryview]:
    """Return the bytes of a picture given as a path, a file object open for reading, or a buffer."""
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file:
                return file.read()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"no picture at {os.fspath(image)!r}", fix="pass a path, a file, or bytes") from error
    if hasattr(image, "read"):
        data = image.read()
        if not isinstance(data, bytes):
            raise InvalidArgumentError("the picture's file is open as text", fix='open it with open(path, "rb")')
        return data
    try:
        view = memoryview(image)
    except TypeError as error:
        raise InvalidArgumentError(
            f"a picture cannot be a {type(image).__name__}",
            fix="pass the bytes of a JPEG, PNG, WebP, GIF or BMP file, a path, or a file object",
        ) from error
    if view.nbytes and not view.c_contiguous:
        raise InvalidArgumentError("the picture's buffer is not contiguous", fix="copy it first: bytes(view)")
    return view.cast("B") if view.nbytes else b""
