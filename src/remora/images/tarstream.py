"""Reads a tar archive from a stream, in bounded memory.

Not `tarfile`: its pax and GNU long-name headers are read whole whatever size they claim, and extended attributes come
back as decoded text. A layer needs exact bytes for names and attributes, and a header may not cost more than a bound.
Understood are ustar, pax (`x`, `g`) and GNU long names (`L`, `K`): what Docker, BuildKit, containerd, skopeo, buildah
and GNU tar write (POSIX.1-2017 pax, tar(5)). Sparse members are refused by name; image tools do not write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from remora.errors import InvalidArgumentError
from remora.images.limits import DEFAULT_LIMITS, Limits

_BLOCK = 512
_CHUNK = 1 << 20
_FILE_TYPES = b"0\x007"
_XATTR_PREFIX = b"SCHILY.xattr."


class Readable(Protocol):
    """A stream of bytes: up to `size` of them, none at its end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(slots=True)
class TarEntry:
    """One member: raw bytes for names; `kind` is one of file, dir, symlink, link, char, block, fifo."""

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime_s: int
    mtime_ns: int
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


_KINDS = {b"1": "link", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}


class TarReader:
    """Iterates over the members of a tar stream; `data()` gives the content of the member that came last."""

    def __init__(self, stream: Readable, limits: Limits = DEFAULT_LIMITS) -> None:
        self._stream = stream
        self._limits = limits
        self._left = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarEntry]:
        extended: dict[bytes, bytes] = {}
        while (header := self._next_header()) is not None:
            flag = header[156:157]
            size = _number(header[124:136])
            if flag in (b"x", b"g"):
                (extended if flag == b"x" else self._globals).update(_parse_pax(self._header_body(size)))
            elif flag == b"L":
                extended[b"path"] = self._header_body(size).rstrip(b"\0")
            elif flag == b"K":
                extended[b"linkpath"] = self._header_body(size).rstrip(b"\0")
            else:
                entry = self._entry(header, flag, size, {**self._globals, **extended})
                extended = {}
                self._left = entry.size_bytes
                self._padding = -entry.size_bytes % _BLOCK
                yield entry
        while self._stream.read(_CHUNK):  # what follows the end marker still counts for the digest
            pass

    def data(self) -> Iterator[bytes]:
        """Yield the rest of the current member's content."""
        while self._left:
            chunk = self._exactly(min(self._left, _CHUNK))
            self._left -= len(chunk)
            yield chunk

    def _entry(self, header: bytes, flag: bytes, size: int, extended: dict[bytes, bytes]) -> TarEntry:
        path = _text(header[0:100])
        if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
            path = prefix + b"/" + path
        path = extended.get(b"path", path)
        if flag == b"S" or any(key.startswith(b"GNU.sparse.") for key in extended):
            raise InvalidArgumentError(f"the layer has a sparse member, {path[:80]!r}", fix="write it without --sparse")
        if flag in (b"0", b"\0", b"7"):
            kind = "dir" if path.endswith(b"/") and flag != b"7" else "file"
        elif flag in _KINDS:
            kind = _KINDS[flag]
        else:
            raise InvalidArgumentError(f"the layer has a member of unknown type {flag!r}: {path[:80]!r}")
        if b"size" in extended:
            size = _decimal(extended[b"size"], b"size")
        mtime_s, mtime_ns = _number(header[136:148]), 0
        if b"mtime" in extended:
            mtime_s, mtime_ns = _time(extended[b"mtime"])
        xattrs = {k[len(_XATTR_PREFIX) :]: v for k, v in extended.items() if k.startswith(_XATTR_PREFIX)}
        if sum(len(k) + len(v) for k, v in xattrs.items()) > self._limits.max_xattr_bytes:
            raise InvalidArgumentError(
                f"extended attributes of {path[:80]!r} exceed {self._limits.max_xattr_bytes} bytes"
            )
        self._limits.check_path(path)
        target = extended.get(b"linkpath", _text(header[157:257]))
        if len(target) > self._limits.max_path_bytes - 1:
            raise InvalidArgumentError(f"the link {path[:80]!r} has a target of {len(target)} bytes")
        if b"\0" in path or b"\0" in target:
            raise InvalidArgumentError(f"a NUL byte in a name of the layer: {path[:80]!r}")
        return TarEntry(
            path=path,
            kind=kind,
            mode=_number(header[100:108]) & 0o7777,
            uid=_owner(extended.get(b"uid"), header[108:116]),
            gid=_owner(extended.get(b"gid"), header[116:124]),
            # Only regular files have content; some writers leave a size on links (POSIX says to ignore it there).
            size_bytes=size if kind == "file" else 0,
            mtime_s=max(0, mtime_s),
            mtime_ns=mtime_ns,
            target=target,
            xattrs=xattrs,
        )

    def _next_header(self) -> bytes | None:
        for _ in self.data():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0
        header = self._at_most(_BLOCK)
        if not header or not header.strip(b"\0"):
            return None
        if len(header) < _BLOCK:
            raise InvalidArgumentError("the archive ends in the middle of a header; it is cut off")
        # The sum counts its own field as eight spaces; it is six octal digits in every dialect.
        digits = _text(header[148:156]).strip(b" ")
        stored = int(digits, 8) if digits and not digits.strip(b"01234567") else -1
        if stored != sum(header) - sum(header[148:156]) + 8 * 0x20:
            raise InvalidArgumentError("this is no tar archive, or a damaged one: the checksum of a header is wrong")
        return header

    def _header_body(self, size: int) -> bytes:
        if size > self._limits.max_header_bytes:
            raise InvalidArgumentError(f"a tar header of {size} bytes; {self._limits.max_header_bytes} are allowed")
        body = self._exactly(size)
        self._padding = -size % _BLOCK
        return body

    def _exactly(self, size: int) -> bytes:
        data = self._at_most(size)
        if len(data) < size:
            raise InvalidArgumentError("the archive ends in the middle of a member; it is cut off")
        return data

    def _at_most(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) == size or not data:
            return data
        parts, have = [data], len(data)
        while have < size and (data := self._stream.read(size - have)):
            parts.append(data)
            have += len(data)
        return b"".join(parts)


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _number(raw: bytes) -> int:
    """Octal text, or base 256 when the top bit is set (GNU)."""
    if raw[0] in (0x80, 0xFF):
        value = int.from_bytes(raw[1:], "big", signed=raw[0] == 0xFF)
        if value >= 1 << 63:
            raise InvalidArgumentError("a number in a tar header is out of range")
        return value
    text = _text(raw).strip(b" ")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise InvalidArgumentError(f"a number in a tar header is not octal: {raw!r}") from None


def _decimal(raw: bytes, key: bytes) -> int:
    if not raw.isdigit() or len(raw) > 19:
        raise InvalidArgumentError(f"the pax header {key.decode()} is no number: {raw[:40]!r}")
    return int(raw)


def _owner(pax: bytes | None, raw: bytes) -> int:
    value = _number(raw) if pax is None else _decimal(pax, b"uid/gid")
    if not 0 <= value < 1 << 32:
        raise InvalidArgumentError(f"user or group id {value} in the layer is out of range")
    return value


def _time(raw: bytes) -> tuple[int, int]:
    seconds, _, fraction = raw.partition(b".")
    if seconds.startswith(b"-"):
        return 0, 0
    return _decimal(seconds, b"mtime"), int(fraction[:9].ljust(9, b"0")) if fraction.isdigit() else 0


def _parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Records of the form `LENGTH KEY=VALUE\\n`, where the length counts all of the record."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = body[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length > len(body) or not equals or not value.endswith(b"\n"):
            raise InvalidArgumentError("a pax header of the layer is malformed")
        found[key] = value[:-1]
        at += length
    return found
