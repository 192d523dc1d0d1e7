"""A vhost-user back end that gives a QEMU guest a vsock device and the host Firecracker's hybrid sockets.

With it the guest's vsock path, the one that Firecracker and Cloud Hypervisor use, runs for real under emulation and
without kernel modules. Not for production: QEMU can neither save nor migrate a machine with this device.

Formats: QEMU's docs/interop/vhost-user.rst; split virtqueues and the vsock device of the VIRTIO 1.2 specification
(2.7, 5.10); hybrid sockets as Firecracker's docs/vsock.md.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import selectors
import socket
import struct
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

_HEADER = struct.Struct("<III")
_REPLY = 0x5  # version 1, reply
_NEED_REPLY = 0x8
_VERSION_1, _PROTOCOL_FEATURES = 1 << 32, 1 << 30
_REPLY_ACK, _CONFIG = 1 << 3, 1 << 9
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE = 1, 2
_PACKET = struct.Struct("<QQIIIHHIII")
_REQUEST, _RESPONSE, _RST, _SHUTDOWN, _RW, _CREDIT_UPDATE, _CREDIT_REQUEST = range(1, 8)
_STREAM = 1
_BUFFER_BYTES = 262144
_HOST_CID = 2
#: Bytes of data in one packet. The guest's receive buffers are a page, of which newer kernels keep a part for
#: themselves (linux/virtio_vsock.h, VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE); what does not fit the guest drops in silence.
_CHUNK_BYTES = 3072
_READ_BYTES = 65536


class _Region(NamedTuple):
    guest: int
    size: int
    user: int
    offset: int
    memory: mmap.mmap


class _Queue:
    def __init__(self) -> None:
        self.size = 0
        self.table = self.avail = self.used = 0
        self.next = 0
        self.kick = self.call = -1


class _Stream:
    """One connection: a Unix socket here, a vsock in the guest."""

    def __init__(self, sock: socket.socket, guest_port: int, host_port: int) -> None:
        self.sock = sock
        self.guest_port = guest_port
        self.host_port = host_port
        self.established = False
        self.greets = False
        self.to_local = bytearray()
        self.shut_local = False
        self.eof = False
        #: The guest has closed its end for good: the stream ends once everything has been passed on.
        self.closing = False
        #: Credit, as VIRTIO 1.2, 5.10.6.3 counts it.
        self.sent = self.forwarded = self.told = 0
        self.peer_buffer = self.peer_forwarded = 0


class VhostVsock:
    """Serves one QEMU that connects to `socket_path`; the guest's channel is `name` in `directory`.

    QEMU needs shared memory and `-chardev socket,id=v,path=PATH -device vhost-user-vsock-device,chardev=v`.
    """

    def __init__(self, socket_path: Path, directory: Path, *, name: str = "channel.sock", cid: int = 3) -> None:
        self._channel = directory / name
        self._cid = cid
        self._selector = selectors.DefaultSelector()
        self._regions: list[_Region] = []
        self._queues = [_Queue(), _Queue(), _Queue()]
        self._protocol = 0
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._next_port = 1 << 30
        self._outgoing: deque[bytes] = deque()
        self._listener = self._listen(socket_path, self._qemu_connected)
        self._hybrid = self._listen(self._channel, self._accept)
        self._stop_r, self._stop_w = socket.socketpair()
        self._selector.register(self._stop_r, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="vhost-user vsock")
        self._thread.start()

    def close(self) -> None:
        self._stop_w.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        for stream in self._streams.values():
            stream.sock.close()
        for queue in self._queues:
            for fd in (queue.kick, queue.call):
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._selector.close()
        self._stop_w.close()

    def _listen(self, path: Path, handler: Any) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen(128)
        self._selector.register(sock, selectors.EVENT_READ, handler)
        return sock

    def _run(self) -> None:
        while True:
            for key, events in self._selector.select():
                if key.data is None:
                    return
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            self._deliver()

    # -- vhost-user -------------------------------------------------------------------------------------------------

    def _qemu_connected(self, _events: int) -> None:
        qemu, _ = self._listener.accept()
        self._selector.register(qemu, selectors.EVENT_READ, lambda _events: self._message(qemu))

    def _message(self, qemu: socket.socket) -> None:
        data, ancillary, _, _ = qemu.recvmsg(_HEADER.size, socket.CMSG_SPACE(8 * 4))
        if len(data) < _HEADER.size:
            self._selector.unregister(qemu)
            qemu.close()
            return
        fds = array.array("i")
        for _level, _kind, part in ancillary:
            fds.frombytes(part)
        request, flags, size = _HEADER.unpack(data)
        body = qemu.recv(size, socket.MSG_WAITALL) if size else b""
        answer = self._handle(request, body, list(fds))
        if answer is None and flags & _NEED_REPLY and self._protocol & _REPLY_ACK:
            answer = struct.pack("<Q", 0)
        if answer is not None:
            qemu.sendall(_HEADER.pack(request, _REPLY, len(answer)) + answer)

    def _handle(self, request: int, body: bytes, fds: list[int]) -> bytes | None:
        match request:
            case 1:  # GET_FEATURES
                return struct.pack("<Q", _VERSION_1 | _PROTOCOL_FEATURES)
            case 15:  # GET_PROTOCOL_FEATURES
                return struct.pack("<Q", _CONFIG | _REPLY_ACK)
            case 16:
                (self._protocol,) = struct.unpack("<Q", body)
            case 5:  # SET_MEM_TABLE
                for number, fd in enumerate(fds):
                    guest, size, user, offset = struct.unpack_from("<QQQQ", body, 8 + 32 * number)
                    self._regions.append(_Region(guest, size, user, offset, mmap.mmap(fd, offset + size)))
                    os.close(fd)
            case 8:  # SET_VRING_NUM
                index, number = struct.unpack("<II", body)
                self._queues[index].size = number
            case 9:  # SET_VRING_ADDR
                index, _flags, table, used, avail, _log = struct.unpack("<IIQQQQ", body)
                queue = self._queues[index]
                queue.table, queue.used, queue.avail = table, used, avail
            case 10:  # SET_VRING_BASE
                index, number = struct.unpack("<II", body)
                self._queues[index].next = number
            case 11:  # GET_VRING_BASE: the queue stops
                (index,) = struct.unpack_from("<I", body)
                queue = self._queues[index]
                if queue.kick >= 0:
                    self._selector.unregister(queue.kick)
                    os.close(queue.kick)
                    queue.kick = -1
                return struct.pack("<II", index, queue.next)
            case 12 | 13 if fds:  # SET_VRING_KICK, SET_VRING_CALL
                self._set_event(body[0], fds[0], kick=request == 12)
            case 24:  # GET_CONFIG: the guest's CID
                offset, size, flags = struct.unpack_from("<III", body)
                config = struct.pack("<Q", self._cid)[offset : offset + size].ljust(size, b"\0")
                return struct.pack("<III", offset, size, flags) + config
        return None

    def _set_event(self, index: int, fd: int, *, kick: bool) -> None:
        queue = self._queues[index]
        if kick:
            queue.kick = fd
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, lambda _events: self._kicked(index))
        else:
            if queue.call >= 0:
                os.close(queue.call)
            queue.call = fd

    def _kicked(self, index: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._queues[index].kick, 8)
        if index == 1:
            for packet in self._from_guest():
                self._packet(packet)

    # -- virtqueues -------------------------------------------------------------------------------------------------

    def _at(self, address: int, *, user: bool = False) -> tuple[mmap.mmap, int]:
        for region in self._regions:
            start = region.user if user else region.guest
            if start <= address < start + region.size:
                return region.memory, address - start + region.offset
        raise ValueError(f"the address {address:#x} is in no region")

    def _chains(self, queue: _Queue) -> list[tuple[int, list[tuple[int, int, int]]]]:
        """Return what the guest has made available: per chain its head and (address, length, flags) parts."""
        if not queue.avail:
            return []
        memory, position = self._at(queue.avail, user=True)
        (index,) = struct.unpack_from("<H", memory, position + 2)
        table, base = self._at(queue.table, user=True)
        chains = []
        while queue.next != index:
            (head,) = struct.unpack_from("<H", memory, position + 4 + 2 * (queue.next % queue.size))
            parts, current = [], head
            while True:
                address, length, flags, following = _DESCRIPTOR.unpack_from(table, base + 16 * current)
                parts.append((address, length, flags))
                if not flags & _NEXT:
                    break
                current = following
            chains.append((head, parts))
            queue.next = (queue.next + 1) & 0xFFFF
        return chains

    def _done(self, queue: _Queue, used: list[tuple[int, int]]) -> None:
        memory, position = self._at(queue.used, user=True)
        (index,) = struct.unpack_from("<H", memory, position + 2)
        for head, length in used:
            struct.pack_into("<II", memory, position + 4 + 8 * (index % queue.size), head, length)
            index = (index + 1) & 0xFFFF
        struct.pack_into("<H", memory, position + 2, index)
        if used and queue.call >= 0:
            os.write(queue.call, struct.pack("<Q", 1))

    def _from_guest(self) -> list[bytes]:
        queue = self._queues[1]
        packets, used = [], []
        for head, parts in self._chains(queue):
            data = b""
            for address, length, _flags in parts:
                memory, position = self._at(address)
                data += memory[position : position + length]
            packets.append(data)
            used.append((head, 0))
        self._done(queue, used)
        return packets

    def _deliver(self) -> None:
        """Give the guest packets for as long as it has buffers."""
        queue = self._queues[0]
        if not self._outgoing or not queue.avail:
            return
        used = []
        before = queue.next
        for head, parts in self._chains(queue):
            if not self._outgoing:
                break
            before = (before + 1) & 0xFFFF
            packet = self._outgoing.popleft()
            written = 0
            for address, length, flags in parts:
                if flags & _WRITE and written < len(packet):
                    memory, position = self._at(address)
                    piece = packet[written : written + length]
                    memory[position : position + len(piece)] = piece
                    written += len(piece)
            used.append((head, written))
        queue.next = before
        self._done(queue, used)

    # -- vsock ------------------------------------------------------------------------------------------------------

    def _send(self, stream: _Stream, operation: int, data: bytes = b"", flags: int = 0) -> None:
        stream.told = stream.forwarded
        header = _PACKET.pack(
            _HOST_CID,
            self._cid,
            stream.host_port,
            stream.guest_port,
            len(data),
            _STREAM,
            operation,
            flags,
            _BUFFER_BYTES,
            stream.forwarded & 0xFFFFFFFF,
        )
        self._outgoing.append(header + data)

    def _packet(self, packet: bytes) -> None:
        _src, _dst, guest_port, host_port, length, _kind, operation, flags, buffer, forwarded = _PACKET.unpack_from(
            packet
        )
        stream = self._streams.get((guest_port, host_port))
        if stream is None:
            if operation == _REQUEST:
                stream = self._guest_connects(guest_port, host_port)
            elif operation != _RST:
                with socket.socket(socket.AF_UNIX) as nobody:
                    self._send(_Stream(nobody, guest_port, host_port), _RST)
            if stream is None:
                return
        stream.peer_buffer, stream.peer_forwarded = buffer, forwarded
        if operation == _REQUEST:
            self._send(stream, _RESPONSE)
        elif operation == _RESPONSE:
            stream.established = True
            if stream.greets:
                stream.sock.send(b"OK %d\n" % stream.host_port)
        elif operation == _RW:
            stream.to_local += packet[_PACKET.size : _PACKET.size + length]
        elif operation == _SHUTDOWN:
            if flags & 1:
                stream.eof = True
            stream.shut_local = stream.shut_local or bool(flags & 2)
        elif operation == _RST:
            stream.eof = stream.closing = True
        elif operation == _CREDIT_REQUEST:
            self._send(stream, _CREDIT_UPDATE)
        stream.closing = stream.closing or (operation == _SHUTDOWN and flags & 3 == 3)
        self._flush(stream)

    def _guest_connects(self, guest_port: int, host_port: int) -> _Stream | None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(f"{self._channel}_{host_port}")
        except OSError:
            self._send(_Stream(sock, guest_port, host_port), _RST)
            sock.close()
            return None
        stream = _Stream(sock, guest_port, host_port)
        stream.established = True
        self._add(stream)
        return stream

    def _accept(self, _events: int) -> None:
        sock, _ = self._hybrid.accept()
        # As Firecracker reads it: the line in one piece, and nothing behind it before OK.
        line = sock.recv(32)
        verb, _, number = line.rstrip(b"\n").partition(b" ")
        if verb != b"CONNECT" or not number.isdigit():
            sock.close()
            return
        self._next_port += 1
        stream = _Stream(sock, int(number), self._next_port)
        stream.greets = True
        self._add(stream)
        self._send(stream, _REQUEST)

    def _add(self, stream: _Stream) -> None:
        stream.sock.setblocking(False)
        self._streams[stream.guest_port, stream.host_port] = stream
        self._selector.register(stream.sock, selectors.EVENT_READ, lambda events: self._local_ready(stream, events))

    def _local_ready(self, stream: _Stream, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(stream)
        if events & selectors.EVENT_READ and not stream.eof:
            self._read(stream)
        self._watch(stream)

    def _read(self, stream: _Stream) -> None:
        room = self._room(stream)
        if not stream.established or room <= 0:
            return
        try:
            data = stream.sock.recv(min(room, _READ_BYTES))
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            stream.sent += len(data)
            for start in range(0, len(data), _CHUNK_BYTES):
                self._send(stream, _RW, data[start : start + _CHUNK_BYTES])
        else:
            stream.eof = True
            self._send(stream, _SHUTDOWN, flags=2)

    def _room(self, stream: _Stream) -> int:
        in_flight = (stream.sent - stream.peer_forwarded) & 0xFFFFFFFF
        return stream.peer_buffer - in_flight

    def _flush(self, stream: _Stream) -> None:
        try:
            while stream.to_local:
                taken = stream.sock.send(stream.to_local)
                del stream.to_local[:taken]
                stream.forwarded += taken
                if stream.forwarded - stream.told >= _BUFFER_BYTES // 4:
                    self._send(stream, _CREDIT_UPDATE)
            if stream.closing:
                self._send(stream, _RST)
                self._drop(stream)
                return
            if stream.shut_local:
                stream.shut_local = False
                stream.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._send(stream, _RST)
            self._drop(stream)
            return
        self._watch(stream)

    def _watch(self, stream: _Stream) -> None:
        if stream.sock.fileno() < 0:
            return
        events = 0
        if not stream.eof and (not stream.established or self._room(stream) > 0):
            events |= selectors.EVENT_READ
        if stream.to_local:
            events |= selectors.EVENT_WRITE
        known = stream.sock.fileno() in self._selector.get_map()
        handler = lambda ready: self._local_ready(stream, ready)  # noqa: E731
        if events and known:
            self._selector.modify(stream.sock, events, handler)
        elif events:
            self._selector.register(stream.sock, events, handler)
        elif known:
            self._selector.unregister(stream.sock)

    def _drop(self, stream: _Stream) -> None:
        self._streams.pop((stream.guest_port, stream.host_port), None)
        if stream.sock.fileno() in self._selector.get_map():
            self._selector.unregister(stream.sock)
        stream.sock.close()
