"""The host's end of a guest's byte channel: one virtio-serial stream, many Unix sockets.

QEMU cannot snapshot or migrate a vsock device, so its guests speak the mux (wire/mux.py) over one serial port. This
bridge gives the host the two sockets that Firecracker's hybrid vsock would give: `<directory>/channel.sock` takes
`CONNECT <port>\\n` and answers `OK <n>\\n`; a guest's connect to port P arrives at `<directory>/channel.sock_P`.

What a guest sends is hostile until proven otherwise: the mux bounds memory (window x streams), a protocol error ends
this guest's channel and nothing else, and the only thing a guest can choose is a port number.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path

from remora.errors import ProtocolError, RemoraError, UnavailableError
from remora.reactor import READ, WRITE, Reactor, Timer
from remora.vmm.channel import MAX_CONNECT_LINE, SOCKET_NAME, guest_socket
from remora.wire import mux as wire

CHUNK_BYTES = 65536
#: Bytes taken from the mux at a time: while they wait for the guest nothing else is pulled, so this is the bound.
OUTGOING_BYTES = 262144
CONNECT_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.1
MAX_PORT = 0xFFFFFFFF


class _Local:
    """One Unix connection and the stream it is joined to (None before CONNECT was read)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream: int | None = None
        self.line = b""
        self.port = -1
        #: Waits for the guest's answer: OK has not been sent.
        self.greeting = False
        self.to_guest = memoryview(b"")
        #: At most one window: the guest may not send more before it gets credit.
        self.to_local = bytearray()
        self.read_closed = False
        self.half_closed = False
        self.timer: Timer | None = None
        self.events = READ
        self.watched = False


class Bridge:
    """Joins a guest's channel with the sockets in `directory`. Everything runs in the reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        channel: socket.socket,
        directory: Path,
        *,
        on_end: Callable[[RemoraError], None],
        mux: wire.Mux | None = None,
    ) -> None:
        """Take over `channel` and listen; `on_end` is told once why the channel ended, unless `close` ended it."""
        self._reactor = reactor
        self._channel = channel
        self._channel.setblocking(False)
        self._directory = directory
        self._on_end = on_end
        self._mux = mux or wire.Mux(initiator=True)
        self._outgoing: deque[memoryview] = deque()
        self._channel_events = READ
        self._locals: dict[int, _Local] = {}
        self._by_stream: dict[int, _Local] = {}
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        try:
            self._listener.bind(str(directory / SOCKET_NAME))
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        reactor.register(self._listener.fileno(), READ, self._accept)
        reactor.register(self._channel.fileno(), READ, self._on_channel)
        self._flush()

    def close(self) -> None:
        """Close every connection and remove the socket."""
        if self._closed:
            return
        self._closed = True
        for local in list(self._locals.values()):
            self._drop(local)
        for sock in (self._listener, self._channel):
            self._reactor.unregister(sock.fileno())
            sock.close()
        try:
            os.unlink(self._directory / SOCKET_NAME)
        except FileNotFoundError:
            pass

    def _end(self, error: RemoraError) -> None:
        if not self._closed:
            self.close()
            self._on_end(error)

    # -- the guest's side -------------------------------------------------------------------------------------------

    def _on_channel(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if self._closed or not events & ~WRITE:
            return
        try:
            data = self._channel.recv(OUTGOING_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(UnavailableError(f"the guest's channel broke: {error.strerror}"))
            return
        if not data:
            self._end(UnavailableError("the guest's channel was closed"))
            return
        try:
            for event in self._mux.receive(data):
                self._on_event(event)
        except ProtocolError as error:
            self._end(ProtocolError(f"the guest broke the channel's protocol: {error.message}"))
            return
        self._flush()

    def _on_event(self, event: wire.Event) -> None:
        if isinstance(event, wire.Opened):
            self._guest_opened(event.stream, event.port)
            return
        local = self._by_stream.get(event.stream)
        if local is None:
            return
        if isinstance(event, wire.Data):
            self._to_local(local, event.payload)
        elif isinstance(event, wire.Accepted):
            local.greeting = False
            # A fresh socket's buffer takes this line whole.
            self._to_local(local, memoryview(b"OK %d\n" % event.stream), credit=False)
            self._watch(local)
        elif isinstance(event, wire.Writable):
            self._from_local(local)
        elif isinstance(event, wire.HalfClosed):
            local.half_closed = True
            self._finish(local)
        else:
            # Rejected or Reset: the stream is gone at the other end.
            self._by_stream.pop(event.stream, None)
            local.stream = None
            self._drop(local)

    def _guest_opened(self, stream: int, port: int) -> None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:
            # Out of descriptors: this stream must do without.
            self._mux.reject(stream, wire.BUSY)
            return
        sock.setblocking(False)
        try:
            sock.connect(str(guest_socket(self._directory, port)))
        except OSError as error:
            sock.close()
            # EAGAIN: the listener's backlog is full.
            self._mux.reject(stream, wire.BUSY if isinstance(error, BlockingIOError) else wire.REFUSED)
            return
        self._mux.accept(stream)
        local = _Local(sock)
        local.stream = stream
        self._add(local)

    def _flush(self) -> None:
        """Write what the mux has for the guest, until the guest takes no more."""
        if self._closed:
            return
        try:
            while True:
                if not self._outgoing:
                    self._outgoing.extend(memoryview(data).cast("B") for data in self._mux.outgoing(OUTGOING_BYTES))
                    if not self._outgoing:
                        break
                sent = self._channel.sendmsg([*self._outgoing][:64])
                while self._outgoing and sent >= len(self._outgoing[0]):
                    sent -= len(self._outgoing.popleft())
                if sent:
                    self._outgoing[0] = self._outgoing[0][sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(UnavailableError(f"the guest's channel broke: {error.strerror}"))
            return
        events = READ | WRITE if self._outgoing else READ
        if events != self._channel_events:
            self._channel_events = events
            self._reactor.modify(self._channel.fileno(), events)

    # -- the host's side --------------------------------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors: this caller must wait, the guest's other streams go on.
            self._reactor.unregister(self._listener.fileno())
            self._reactor.call_later(ACCEPT_PAUSE_S, self._listen_again)
            return
        sock.setblocking(False)
        local = _Local(sock)
        local.timer = self._reactor.call_later(CONNECT_TIMEOUT_S, lambda: self._drop(local))
        self._add(local)

    def _listen_again(self) -> None:
        if not self._closed:
            self._reactor.register(self._listener.fileno(), READ, self._accept)

    def _add(self, local: _Local) -> None:
        self._locals[local.sock.fileno()] = local
        if local.stream is not None:
            self._by_stream[local.stream] = local
        local.watched = True
        self._reactor.register(local.sock.fileno(), READ, lambda events: self._on_local(local, events))

    def _on_local(self, local: _Local, events: int) -> None:
        try:
            self._serve_local(local, events)
        except ProtocolError as error:
            # A guest that provokes answers and reads none.
            self._end(error)

    def _serve_local(self, local: _Local, events: int) -> None:
        if local.port < 0 and local.stream is None:
            self._read_connect(local)
        else:
            if events & WRITE:
                self._drain(local)
            if local.sock.fileno() >= 0 and events & ~WRITE:
                self._from_local(local)
        self._flush()

    def _read_connect(self, local: _Local) -> None:
        """Read the CONNECT line byte by byte at its end: what follows it belongs to the guest."""
        try:
            peeked = local.sock.recv(MAX_CONNECT_LINE - len(local.line), socket.MSG_PEEK)
            end = peeked.find(b"\n")
            taken = local.sock.recv(len(peeked) if end < 0 else end + 1)
        except BlockingIOError:
            return
        except OSError:
            self._drop(local)
            return
        local.line += taken
        if not taken or (end < 0 and len(local.line) >= MAX_CONNECT_LINE):
            self._drop(local)
            return
        if end < 0:
            return
        verb, _, number = local.line.strip().partition(b" ")
        if verb != b"CONNECT" or not number.isdigit() or int(number) > MAX_PORT:
            self._drop(local)
            return
        local.port = int(number)
        local.greeting = True
        if local.timer is not None:
            local.timer.cancel()
            local.timer = None
        # Until the guest answers only a hang-up matters.
        self._watch(local)
        # Before the guest is up the mux keeps this for it.
        self._open(local)

    def _open(self, local: _Local) -> None:
        try:
            local.stream = self._mux.open(local.port)
        except RemoraError as error:
            self._reactor.on_error(error)
            self._drop(local)
            return
        self._by_stream[local.stream] = local
        self._flush()

    def _from_local(self, local: _Local) -> None:
        """Pass on what the host wrote, as far as the guest's credit goes."""
        stream = local.stream
        if stream is None or local.greeting:
            # Nothing may be sent before OK, so readiness means that the caller has left.
            self._drop(local)
            return
        try:
            for _ in range(8):
                if not local.to_guest:
                    if local.read_closed:
                        break
                    data = local.sock.recv(CHUNK_BYTES)
                    if not data:
                        local.read_closed = True
                        self._mux.close_write(stream)
                        break
                    local.to_guest = memoryview(data)
                taken = self._mux.send(stream, local.to_guest)
                local.to_guest = local.to_guest[taken:]
                if local.to_guest:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._drop(local)
            return
        self._finish(local)

    def _to_local(self, local: _Local, data: memoryview, *, credit: bool = True) -> None:
        sent = 0
        if not local.to_local:
            try:
                sent = local.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(local)
                return
            if sent and credit and local.stream is not None:
                self._mux.consumed(local.stream, sent)
        if sent < len(data):
            local.to_local += data[sent:]
            self._watch(local)

    def _drain(self, local: _Local) -> None:
        try:
            while local.to_local:
                sent = local.sock.send(local.to_local)
                del local.to_local[:sent]
                if local.stream is not None:
                    self._mux.consumed(local.stream, sent)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(local)
            return
        self._finish(local)

    def _finish(self, local: _Local) -> None:
        """Pass an end of file on once everything before it has been; drop what has ended both ways."""
        if local.half_closed and not local.to_local:
            if local.read_closed and not local.to_guest:
                if local.stream is not None:
                    self._by_stream.pop(local.stream, None)
                    local.stream = None
                self._drop(local)
                return
            try:
                local.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._drop(local)
                return
        self._watch(local)

    def _watch(self, local: _Local) -> None:
        """Wait for what can happen next; a socket with nothing to do is not watched, as its hang-up would spin."""
        fd = local.sock.fileno()
        if fd < 0:
            return
        events = 0
        if not (local.read_closed or local.to_guest or local.greeting):
            events |= READ
        if local.to_local:
            events |= WRITE
        watched = bool(events) or local.greeting
        if watched != local.watched:
            local.watched = watched
            if watched:
                self._reactor.register(fd, events, lambda ready: self._on_local(local, ready))
            else:
                self._reactor.unregister(fd)
        elif watched and events != local.events:
            self._reactor.modify(fd, events)
        local.events = events

    def _drop(self, local: _Local) -> None:
        """Close the connection; resets its stream unless that has ended already."""
        fd = local.sock.fileno()
        if fd < 0:
            return
        if local.timer is not None:
            local.timer.cancel()
        self._reactor.unregister(fd)
        self._locals.pop(fd, None)
        local.sock.close()
        local.to_local.clear()
        if local.stream is not None:
            self._by_stream.pop(local.stream, None)
            if not self._closed:
                self._mux.reset(local.stream)
            local.stream = None
