"""Protobuf messages by declaration, in the standard library alone.

Google's package costs a process 36 ms of CPU and 8 MB, which the guest and the shim cannot afford, and it copies every
bytes field, which a tensor cannot afford. A message is a class:

    class Label(Message):
        index: int = uint32(1)
        name: str = string(2)
        picture: bytes | memoryview = bytes_(3)

proto3 rules: an absent scalar reads as its default, `optional=True` and messages read as None. A bytes field whose
annotation names `memoryview` decodes to a slice of the received buffer, without a copy and only valid as long as that
buffer is; one annotated `bytes` decodes to bytes of its own. `encode` returns pieces for `sendmsg`, in which large
buffers are the caller's own. Unknown fields are dropped; `class Label(Message, keep_unknown=True)` keeps and re-encodes
them. Oneofs are plain fields here: the last one set does not clear its siblings.

Python 3.9; only declarations live here, the wire in `protobuf_codec` and `protobuf_kinds`.
"""

from __future__ import annotations

import struct

from remora.wire import protobuf_codec as codec
from remora.wire import protobuf_kinds as kinds
from remora.wire.protobuf_codec import BIG_BYTES
from remora.wire.protobuf_kinds import DecodeError, EncodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, ClassVar, Dict, FrozenSet, List, Optional, Tuple, Type, TypeVar, Union

    from remora.wire.protobuf_codec import Decoder, Encoder
    from remora.wire.protobuf_kinds import Piece

    M = TypeVar("M", bound="Message")

__all__ = [
    "DEFAULT",
    "DecodeError",
    "EncodeError",
    "Field",
    "Limits",
    "Message",
    "bool_",
    "bytes_",
    "double",
    "enum",
    "fixed32",
    "fixed64",
    "float_",
    "gather",
    "int32",
    "int64",
    "map_",
    "message",
    "sfixed32",
    "sfixed64",
    "sint32",
    "sint64",
    "string",
    "uint32",
    "uint64",
]


class Limits:
    """What a decoder accepts, so that no peer can make it recurse or allocate out of proportion.

    Args:
        max_bytes: Size of the whole message.
        max_depth: Nesting of messages, map entries and unknown groups.
        max_elements: Repeated elements and map entries in the whole message; each may cost 100 bytes and more.
    """

    __slots__ = ("max_bytes", "max_depth", "max_elements")

    def __init__(self, *, max_bytes: int = (1 << 31) - 1, max_depth: int = 32, max_elements: int = 1 << 16) -> None:
        self.max_bytes = max_bytes
        self.max_depth = max_depth
        self.max_elements = max_elements


DEFAULT = Limits()


class Field:
    """One declared field. As a class attribute it makes the list or dict of a repeated field when first read."""

    __slots__ = ("name", "number", "kind", "repeated", "optional", "map_key", "cls", "view")

    def __init__(
        self,
        number: int,
        kind: str,
        *,
        repeated: bool = False,
        optional: bool = False,
        map_key: str = "",
        cls: Any = None,
    ) -> None:
        if not 1 <= number < 1 << 29:
            raise TypeError(f"field number {number} is not within 1..{(1 << 29) - 1}")
        self.name = ""
        self.number = number
        self.kind = kind
        self.repeated = repeated
        self.optional = optional
        self.map_key = map_key
        self.cls = cls
        self.view = True

    def __get__(self, instance: Optional[Message], owner: Any) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self.name, {} if self.map_key else [])

    @property
    def default(self) -> Any:
        return None if self.optional else kinds.DEFAULTS[self.kind]

    @property
    def message_class(self) -> Any:
        """The class of a message field; a function that returns it where a class refers to itself."""
        return self.cls if isinstance(self.cls, type) else self.cls()


class Message:
    """Base of all messages. Instances hold only the fields that were set or received, in `__dict__`."""

    _fields: ClassVar[Dict[str, Field]] = {}
    _names: ClassVar[FrozenSet[str]] = frozenset()
    _compiled: ClassVar[Any] = None
    _keep_unknown: ClassVar[bool] = False

    def __init_subclass__(cls, *, keep_unknown: bool = False) -> None:
        fields = dict(cls._fields)
        annotations = cls.__dict__.get("__annotations__", {})  # noqa: RUF063 - inspect costs 5 ms
        for name, field in list(cls.__dict__.items()):
            if not isinstance(field, Field):
                continue
            if name.startswith("_") or hasattr(Message, name):
                raise TypeError(f"{cls.__name__}.{name}: this name belongs to Message; declare it with another")
            field.name = name
            field.view = "memoryview" in str(annotations.get(name, "memoryview"))
            fields[name] = field
            if not field.repeated and not field.map_key:
                setattr(cls, name, field.default)
        numbers = {field.number for field in fields.values()}
        if len(numbers) != len(fields):
            raise TypeError(f"{cls.__name__} declares a field number twice")
        cls._fields = fields
        cls._names = frozenset(fields)
        cls._compiled = None
        cls._keep_unknown = keep_unknown or cls._keep_unknown

    def __init__(self, **values: Any) -> None:
        if values:
            if not values.keys() <= self._names:
                unknown = ", ".join(sorted(values.keys() - self._names))
                raise TypeError(f"{type(self).__name__} has no field {unknown}; it has {', '.join(self._fields)}")
            self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(f"{type(self).__name__} has no field {name}; it has {', '.join(self._fields)}")
        self.__dict__[name] = value

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self.__dict__, other.__dict__
        for name, field in self._fields.items():
            if field.repeated:
                if list(mine.get(name) or ()) != list(theirs.get(name) or ()):
                    return False
            elif field.map_key:
                if (mine.get(name) or {}) != (theirs.get(name) or {}):
                    return False
            elif mine.get(name, field.default) != theirs.get(name, field.default):
                return False
        return bool(mine.get("_unknown", b"") == theirs.get("_unknown", b""))

    __hash__ = None  # type: ignore[assignment]  # messages are mutable

    def __repr__(self) -> str:
        shown = []
        for name in self._fields:
            value = self.__dict__.get(name)
            if value is None or (value == [] or value == {}):
                continue
            long = isinstance(value, (bytes, bytearray, memoryview)) and len(value) > 32
            shown.append(f"{name}=<{len(value)} bytes>" if long else f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    # -- encoding ---------------------------------------------------------------------------------------------------

    def encode_to(self, out: List[Piece]) -> None:
        """Append the message's pieces to `out`, many of them tiny: see `gather`.

        Raises:
            EncodeError: a field holds what its kind cannot carry.
        """
        values = self.__dict__
        name = ""
        try:
            for name, present, encode in self._codec()[0]:
                value = values.get(name)
                if value is not None and (present or value or _is_minus_zero(value)):
                    encode(out, value)
        except (TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            raise EncodeError(f"{type(self).__name__}.{name}: {error}") from error
        unknown = values.get("_unknown")
        if unknown:
            out.append(unknown)

    def encode(self) -> List[Piece]:
        """Return the message as few pieces; bytes fields of `BIG_BYTES` and more are the caller's own buffers."""
        out: List[Piece] = []
        self.encode_to(out)
        return gather(out)

    def to_bytes(self) -> bytes:
        out: List[Piece] = []
        self.encode_to(out)
        return b"".join(out)

    def byte_size(self) -> int:
        out: List[Piece] = []
        self.encode_to(out)
        return sum(map(len, out))

    # -- decoding ---------------------------------------------------------------------------------------------------

    @classmethod
    def decode(cls: Type[M], buffer: Union[bytes, bytearray, memoryview], *, limits: Limits = DEFAULT) -> M:
        """Return the message in `buffer` (all of it).

        Raises:
            DecodeError: malformed, or beyond `limits`.
        """
        message = cls()
        buf = kinds.as_bytes_view(buffer)
        size = len(buf)
        if not size:
            return message
        if size > limits.max_bytes:
            raise DecodeError(f"a message of {size} bytes exceeds the decoder's max_bytes of {limits.max_bytes}")
        try:
            codec.read_fields(message, buf, 0, size, codec.Context(limits.max_depth, limits.max_elements))
        except DecodeError as error:
            error.message = f"{cls.__name__}: {error.message}"
            raise
        except (IndexError, struct.error) as error:
            raise DecodeError(f"{cls.__name__}: the message ends in the middle of a field") from error
        except UnicodeDecodeError as error:
            raise DecodeError(f"{cls.__name__}: a string is not UTF-8: {error}") from error
        return message

    # -- compiled form ----------------------------------------------------------------------------------------------

    @classmethod
    def _codec(cls) -> Tuple[List[Tuple[str, bool, Encoder]], Dict[int, Decoder], bool]:
        """Return (encoders by field, decoders by tag, keep unknown fields), built when first wanted."""
        compiled: Optional[Tuple[List[Tuple[str, bool, Encoder]], Dict[int, Decoder], bool]] = cls._compiled
        if compiled is None:
            encoders: List[Tuple[str, bool, Encoder]] = []
            decoders: Dict[int, Decoder] = {}
            for field in sorted(cls._fields.values(), key=lambda field: field.number):
                encoders.append((field.name, field.optional or field.kind == "message", _encoder(field)))
                decoders.update(_decoders(field))
            compiled = cls._compiled = encoders, decoders, cls._keep_unknown
        return compiled


def _is_minus_zero(value: Any) -> bool:
    """-0.0 is falsy but no default: its bits are not zero."""
    return value.__class__ is float and str(value)[0] == "-"


def gather(out: List[Piece]) -> List[Piece]:
    """Join neighbouring small pieces; large ones stay as they are."""
    if not out or max(map(len, out)) < BIG_BYTES:
        return [b"".join(out)]
    gathered: List[Piece] = []
    first = 0
    for index, piece in enumerate(out):
        if len(piece) >= BIG_BYTES:
            if index > first:
                gathered.append(b"".join(out[first:index]))
            gathered.append(piece)
            first = index + 1
    if first < len(out):
        gathered.append(b"".join(out[first:]))
    return gathered


def _key(number: int, wire_type: int) -> bytes:
    return kinds.varint(number << 3 | wire_type)


def _single_encoder(kind: str, number: int, cls: Any) -> Encoder:
    if kind == "message":
        return codec.message_encoder(cls, _key(number, kinds.LENGTH))
    return codec.scalar_encoder(kind, _key(number, kinds.wire_type(kind)))


def _encoder(field: Field) -> Encoder:
    cls = field.message_class if field.kind == "message" else None
    key = _key(field.number, kinds.LENGTH)
    if field.map_key:
        return codec.map_encoder(key, _single_encoder(field.map_key, 1, None), _single_encoder(field.kind, 2, cls))
    if field.repeated and kinds.wire_type(field.kind) != kinds.LENGTH:
        return codec.packed_encoder(field.kind, key)
    one = _single_encoder(field.kind, field.number, cls)
    return codec.repeated_encoder(one) if field.repeated else one


def _single_decoder(kind: str, name: str, view: bool, cls: Any) -> Decoder:
    if kind == "message":
        return codec.message_decoder(cls, name)
    if kind in kinds.VARINTS:
        return codec.varint_decoder(kind, name)
    if kind in kinds.FIXED:
        return codec.fixed_decoder(kind, name)
    return codec.length_decoder(kind, name, view)


def _decoders(field: Field) -> Dict[int, Decoder]:
    cls = field.message_class if field.kind == "message" else None
    number, wire_type = field.number << 3, kinds.wire_type(field.kind)
    if field.map_key:
        return {number | kinds.LENGTH: _map_decoder(field, cls)}
    one = _single_decoder(field.kind, field.name, field.view, cls)
    if not field.repeated:
        return {number | wire_type: one}
    decoders = {number | wire_type: codec.repeated_decoder(one, field.name)}
    if wire_type != kinds.LENGTH:
        decoders[number | kinds.LENGTH] = codec.packed_decoder(field.kind, field.name)
    return decoders


def _map_decoder(field: Field, cls: Any) -> Decoder:
    key_default = kinds.DEFAULTS[field.map_key]

    def entry_of(entry: Dict[str, Any]) -> Tuple[Any, Any]:
        key = entry.get("key", key_default)
        if "value" in entry:
            return key, entry["value"]
        return key, field.default if cls is None else cls()

    return codec.map_decoder(
        field.name,
        _single_decoder(field.map_key, "key", False, None),
        _single_decoder(field.kind, "value", field.view, cls),
        (8 | kinds.wire_type(field.map_key), 16 | kinds.wire_type(field.kind)),
        entry_of,
    )


# -- the kinds: each declares a field. They return Any so that `index: int = uint32(1)` type-checks. ------------------


def _scalar(kind: str) -> Callable[..., Any]:
    def declare(number: int, *, repeated: bool = False, optional: bool = False) -> Any:
        return Field(number, kind, repeated=repeated, optional=optional)

    declare.__name__ = kind
    return declare


bool_ = _scalar("bool")
bytes_ = _scalar("bytes")
double = _scalar("double")
enum = _scalar("enum")
fixed32 = _scalar("fixed32")
fixed64 = _scalar("fixed64")
float_ = _scalar("float")
int32 = _scalar("int32")
int64 = _scalar("int64")
sfixed32 = _scalar("sfixed32")
sfixed64 = _scalar("sfixed64")
sint32 = _scalar("sint32")
sint64 = _scalar("sint64")
string = _scalar("string")
uint32 = _scalar("uint32")
uint64 = _scalar("uint64")


def message(number: int, cls: Any, *, repeated: bool = False) -> Any:
    """Declare a field of message class `cls`; a function that returns the class where it is not defined yet."""
    return Field(number, "message", repeated=repeated, cls=cls)


def map_(number: int, key: str, value: Any) -> Any:
    """Declare a map; `key` is a kind's name, `value` a kind's name or a message class."""
    if isinstance(value, str):
        return Field(number, value, map_key=key)
    return Field(number, "message", map_key=key, cls=value)
