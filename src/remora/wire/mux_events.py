"""What `mux.Mux.receive` reports, as values."""

from __future__ import annotations

#: Why a stream was rejected or reset, as it travels.
REFUSED = 1  # nobody listens on the port
BUSY = 2  # too many streams
ABORTED = 3  # an end gave it up
RESTARTED = 4  # the channel started anew (boot, restore, migration, lost bytes)


class Event:
    """Something happened on `stream` (0: on the whole channel)."""

    __slots__ = ("stream",)

    def __init__(self, stream: int = 0) -> None:
        self.stream = stream

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("stream", *self.__slots__))
        return f"{type(self).__name__}({shown})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(
            getattr(self, name) == getattr(other, name) for name in ("stream", *self.__slots__)
        )

    __hash__ = None  # type: ignore[assignment]  # a value that nobody uses as a key


class Opened(Event):
    """The peer wants a stream to `port`: answer with `accept` or `reject`."""

    __slots__ = ("port",)

    def __init__(self, stream: int, port: int) -> None:
        self.stream = stream
        self.port = port


class Accepted(Event):
    """A stream that this end opened is connected."""

    __slots__ = ()


class Rejected(Event):
    """A stream that this end opened was not accepted; it is gone."""

    __slots__ = ("reason",)

    def __init__(self, stream: int, reason: int) -> None:
        self.stream = stream
        self.reason = reason


class Data(Event):
    """Bytes from the peer. Call `consumed` when they have been passed on."""

    __slots__ = ("payload",)

    def __init__(self, stream: int, payload: memoryview) -> None:
        self.stream = stream
        self.payload = payload


class HalfClosed(Event):
    """The peer sends no more on this stream."""

    __slots__ = ()


class Reset(Event):
    """The stream is gone, in both directions."""

    __slots__ = ("reason",)

    def __init__(self, stream: int, reason: int) -> None:
        self.stream = stream
        self.reason = reason


class Writable(Event):
    """`send` will take bytes again."""

    __slots__ = ()


class Synced(Event):
    """Both ends know each other: streams can flow."""

    __slots__ = ("epoch",)

    def __init__(self, epoch: int) -> None:
        self.stream = 0
        self.epoch = epoch


class PeerRestarted(Event):
    """The peer is another than before, or bytes were lost. A `Reset` for each stream follows."""

    __slots__ = ("epoch",)

    def __init__(self, epoch: int) -> None:
        self.stream = 0
        self.epoch = epoch
