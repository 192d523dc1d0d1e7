"""The guest's end of the channel: one virtio-serial port, many streams.

The port never tells the guest that it was restored or migrated, or to whom it now talks. It is therefore watched
edge-triggered (an absent host would otherwise be reported for ever) and every new connection is known only by the
mux's new epoch, on which all streams are gone. A read of 0 bytes means that no host is there; the next event or a slow
timer tries again.
"""

from __future__ import annotations

import errno
import os
import select
import time

from remora.errors import ProtocolError
from remora.guest.streams import Stream, nothing
from remora.wire.mux import (
    Accepted,
    Data,
    HalfClosed,
    Mux,
    Opened,
    PeerRestarted,
    Rejected,
    Reset,
    Writable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Mapping, Type

    from remora.reactor import Reactor
    from remora.wire.mux import Event

_PORTS = "/sys/class/virtio-ports"
#: The driver gives out at most a page per read; so many reads are fed to the mux at once.
_READ_BYTES = 65536
_WRITE_BYTES = 32768  # virtio_console copies no more per write
_RETRY_S = 0.1


def find_port(name: str, timeout_s: float = 5.0) -> str:
    """Return the device node of the virtio-serial port called `name`.

    Raises:
        OSError: no such port appeared in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ports = os.listdir(_PORTS)
        except FileNotFoundError:
            ports = []
        for port in ports:
            try:
                with open(f"{_PORTS}/{port}/name", encoding="utf-8") as file:
                    if file.read().strip() == name:
                        return f"/dev/{port}"
            except FileNotFoundError:
                continue  # a port gets its name only after it appears
        if time.monotonic() > deadline:
            raise OSError(errno.ENODEV, f"no virtio-serial port is called {name}; ports: {', '.join(ports) or 'none'}")
        time.sleep(0.002)


class Channel:
    """Owns the port's descriptor and the mux.

    Args:
        fd: The port, or in tests a socket.
        services: by port, called with each stream that the peer opens to it; other ports are rejected.
        on_restart: called when another host, or the same one anew, is at the other end.
        initiator: the host's end, in tests.
    """

    def __init__(
        self,
        reactor: Reactor,
        fd: int,
        services: Mapping[int, Callable[[Stream], None]],
        on_restart: Callable[[], None] = nothing,
        *,
        initiator: bool = False,
    ) -> None:
        os.set_blocking(fd, False)
        self._reactor = reactor
        self._fd = fd
        self._services = services
        self._on_restart = on_restart
        self._initiator = initiator
        self._mux = Mux(initiator)
        self._streams: Dict[int, Stream] = {}
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._out = memoryview(b"")
        self._pumping = False
        self._again = False
        self._retrying = False
        self._drained: List[Callable[[], None]] = []
        reactor.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET, self._ready)
        self._soon()

    # -- streams ----------------------------------------------------------------------------------------------------

    def open(self, port: int) -> Stream:
        """Ask the host for a stream to `port`; `on_accepted` or `on_reset` follows."""
        stream = Stream(self, self._mux.open(port), port)
        self._streams[stream.number] = stream
        self._soon()
        return stream

    def send(self, stream: Stream, data: bytes) -> int:
        taken = self._mux.send(stream.number, data)
        if taken:
            self._soon()
        return taken

    def close_write(self, stream: Stream) -> None:
        stream.sending = False
        self._mux.close_write(stream.number)
        self._forget_if_done(stream)
        self._soon()

    def reset(self, stream: Stream) -> None:
        self._forget(stream)
        self._mux.reset(stream.number)
        self._soon()

    def consumed(self, stream: Stream, count: int) -> None:
        self._mux.consumed(stream.number, count)
        self._soon()

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call once, when all that streams have taken has left for the port."""
        self._drained.append(callback)
        self._soon()

    def _tell_drained(self) -> None:
        if self._drained:
            callbacks, self._drained = self._drained, []
            for callback in callbacks:
                callback()

    def _forget(self, stream: Stream) -> None:
        stream.open = False
        self._streams.pop(stream.number, None)

    def _forget_if_done(self, stream: Stream) -> None:
        if not stream.sending and not stream.receiving:
            self._forget(stream)

    # -- the port ---------------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        """Write what the mux has at the end of this turn, so that small frames leave together."""
        if not self._again:
            self._again = True
            self._reactor.call_soon(self._pump)

    def _ready(self, _events: int) -> None:
        self._pump()

    def _pump(self) -> None:
        self._again = False
        self._write()
        if self._read():
            self._soon()  # edge-triggered: nobody tells again of what was left unread
        self._write()

    def _read(self) -> bool:
        """Feed the mux once; return whether there may be more."""
        filled = 0
        more = False
        while filled < _READ_BYTES:
            try:
                count = os.readv(self._fd, [self._view[filled:]])
            except BlockingIOError:
                break
            except ConnectionResetError:
                count = 0  # a socket whose peer has gone; the port itself never says so
            if count == 0:
                self._retry_later()
                break
            filled += count
        else:
            more = True
        if filled:
            self._receive(self._view[:filled])
        return more

    def _write(self) -> None:
        while True:
            if not self._out:
                self._out = memoryview(b"".join(self._mux.outgoing(_WRITE_BYTES)))
                if not self._out:
                    self._tell_drained()
                    return
            try:
                taken = os.write(self._fd, self._out)
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._retry_later()
                return
            self._out = self._out[taken:]

    def _retry_later(self) -> None:
        if not self._retrying:
            self._retrying = True
            self._reactor.call_later(_RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self._pump()

    # -- events -----------------------------------------------------------------------------------------------------

    def _receive(self, data: memoryview) -> None:
        try:
            events = self._mux.receive(data)
        except ProtocolError as error:
            self._reactor.on_error(error)
            self._start_anew()
            return
        for event in events:
            kind = type(event)
            if kind is Opened:
                self._opened(event)
            elif kind is PeerRestarted:
                self._on_restart()
            else:
                stream = self._streams.get(event.stream)
                if stream is not None:
                    try:
                        self._on_stream(stream, kind, event)
                    except Exception as error:  # noqa: BLE001 - one stream's fault must not cost others their events
                        self._reactor.on_error(error)
                        stream.reset()

    def _on_stream(self, stream: Stream, kind: Type[Event], event: Any) -> None:
        if kind is Data:
            stream.on_data(event.payload)
        elif kind is Writable:
            stream.on_writable()
        elif kind is Accepted:
            stream.on_accepted()
        elif kind is HalfClosed:
            stream.receiving = False
            self._forget_if_done(stream)
            stream.on_eof()
        elif kind is Reset or kind is Rejected:
            self._forget(stream)
            stream.on_reset()

    def _opened(self, event: Any) -> None:
        self._soon()
        service = self._services.get(event.port)
        if service is None:
            self._mux.reject(event.stream)
            return
        stream = self._streams[event.stream] = Stream(self, event.stream, event.port)
        self._mux.accept(event.stream)  # first: the service may have something to send at once
        service(stream)

    def _start_anew(self) -> None:
        """The host has broken the rules: end everything, and meet whoever is there with a new epoch."""
        self._mux = Mux(self._initiator, flush=True)
        self._out = memoryview(b"")
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.on_reset()
        self._on_restart()
        self._soon()
