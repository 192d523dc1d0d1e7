"""The head of an HTTP/1.1 request, parsed strictly: what two servers could read in two ways is refused.

Request smuggling lives on leniency: bare line feeds, folded lines, blanks before a colon, two lengths, a length beside
a transfer coding. A pure function over bytes; RFC 9112 names the rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from remora.errors import InvalidArgumentError, ProtocolError, RemoraError, ResourceExhaustedError, UnimplementedError

MAX_HEAD_BYTES = 16384
MAX_HEADERS = 100
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]{1,8192}) HTTP/1\.([01])")
#: Field content as RFC 9110, section 5.5, has it: no control characters but the tab.
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}):[ \t]*([\x20-\x7e\x80-\xff\t]*)")
_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
#: A second one of these could be meant for another reader.
_ONCE = frozenset(
    ("content-length", "content-type", "expect", "host", "inference-header-content-length", "transfer-encoding")
)
_DIGITS = re.compile(r"[0-9]{1,18}")


class BadRequestError(ProtocolError):
    """The bytes are no request that can be answered and followed by another."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.http_status = status


@dataclass(frozen=True, slots=True)
class Head:
    method: str
    #: Decoded segments of the path.
    path: tuple[str, ...]
    headers: Mapping[str, str]
    content_length: int
    keep_alive: bool
    #: The client waits for a `100 Continue` before it sends the body.
    expects_continue: bool


def parse(raw: bytes) -> Head:
    """Parse the bytes before the empty line.

    Raises:
        BadRequestError: malformed or ambiguous; carries the status to answer with.
    """
    line, *lines = raw.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise BadRequestError("the first line is not `METHOD /path HTTP/1.1`")
    minor = found[3]
    headers = _headers(lines)
    if minor == b"1" and "host" not in headers:
        raise BadRequestError("an HTTP/1.1 request must have a Host header")
    connection = {token.strip() for token in headers.get("connection", "").lower().split(",")}
    return Head(
        method=found[1].decode("ascii"),
        path=_path(found[2]),
        headers=headers,
        content_length=_length(headers),
        keep_alive="close" not in connection and (minor == b"1" or "keep-alive" in connection),
        expects_continue=_expects_continue(headers, minor),
    )


def _headers(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise BadRequestError(f"the request has more than {MAX_HEADERS} headers", 431)
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise BadRequestError(f"{line[:60].decode('latin-1')!r} is not a header `Name: value`")
        name = found[1].decode("ascii").lower()
        value = found[2].rstrip(b" \t").decode("latin-1")
        if name in headers:
            if name in _ONCE:
                raise BadRequestError(f"the request has two {name} headers")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise BadRequestError("the request has both Content-Length and Transfer-Encoding")
        raise BadRequestError("request bodies with Transfer-Encoding are not accepted: send Content-Length", 411)
    text = headers.get("content-length", "0")
    if not _DIGITS.fullmatch(text):
        raise BadRequestError(f"Content-Length {text[:40]!r} is not a number of bytes")
    return int(text)


def _expects_continue(headers: Mapping[str, str], minor: bytes) -> bool:
    expect = headers.get("expect", "").lower()
    if expect and expect != "100-continue":
        raise BadRequestError(f"Expect {expect[:40]!r} cannot be met", 417)
    return bool(expect) and minor == b"1"


def _path(target: bytes) -> tuple[str, ...]:
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        target = target[absolute.end() :] or b"/"
    if not target.startswith(b"/"):
        raise BadRequestError("the request's target is not a path")
    segments = target.split(b"?", 1)[0].split(b"#", 1)[0][1:].split(b"/")
    try:
        return tuple(unquote_to_bytes(segment).decode() for segment in segments)
    except UnicodeDecodeError as error:
        raise BadRequestError("the request's path is not UTF-8") from error


def check_encoding(headers: Mapping[str, str]) -> None:
    """Refuse bodies that would have to be unpacked.

    Raises:
        UnimplementedError: the body is compressed.
    """
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        error = UnimplementedError(
            f"request bodies with Content-Encoding {encoding[:40]!r} are not accepted", fix="send them uncompressed"
        )
        error.http_status = 415
        raise error


def header_number(headers: Mapping[str, str], name: str) -> int | None:
    """Return a header that is a number, None if it is absent.

    Raises:
        InvalidArgumentError: it is no number.
    """
    text = headers.get(name)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text):
        raise InvalidArgumentError(f"the header {name} is {text[:40]!r}, not a number of bytes")
    return int(text)


def too_large(size: int, limit: int, name: str) -> RemoraError:
    error = ResourceExhaustedError(
        f"a body of {size} bytes was announced, {limit} are allowed ({name})",
        fix="send less at once, or ask the operator to raise it",
    )
    error.http_status = 413
    return error
