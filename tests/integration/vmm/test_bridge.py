"""The host's bridge between a guest's byte channel and Unix sockets, with a mux in this process as the guest."""

from __future__ import annotations

import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remora.errors import ProtocolError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.vmm.bridge import Bridge
from remora.vmm.channel import connect, guest_socket
from remora.wire import mux

PORT = 77


class Host:
    """A bridge on a reactor of its own, as a monitor runs it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ended: list[RemoraError] = []
        self.end = threading.Event()
        self.reactor = Reactor(on_error=lambda error: self._ended(UnavailableError(repr(error))))
        ours, self.guest = socket.socketpair()
        self.bridge = Bridge(self.reactor, ours, directory, on_end=self._ended)
        self.thread = threading.Thread(target=self.reactor.run)
        self.thread.start()

    def _ended(self, error: RemoraError) -> None:
        self.ended.append(error)
        self.end.set()

    def close(self) -> None:
        self.reactor.post(self.bridge.close)
        self.reactor.stop()
        self.thread.join()
        # The loop may have stopped before the posted call.
        self.bridge.close()
        self.reactor.close()
        self.guest.close()


class Guest:
    """A guest that answers on PORT by sending back what it gets, and that can open streams itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.mux = mux.Mux(initiator=False)
        self.lock = threading.Lock()
        self.sending = threading.Lock()
        self.events: list[mux.Event] = []
        self.changed = threading.Condition(self.lock)
        self.pending: dict[int, bytearray] = {}
        self.closing: set[int] = set()
        self.stopped = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._serve()
        except OSError:
            pass  # the host cut this guest off

    def _serve(self) -> None:
        self.flush()
        while data := self.sock.recv(65536):
            with self.lock:
                for event in self.mux.receive(data):
                    self._on(event)
                self.events_seen()
            self.flush()

    def events_seen(self) -> None:
        self.changed.notify_all()

    def _on(self, event: mux.Event) -> None:
        self.events.append(event)
        if isinstance(event, mux.Opened):
            if event.port == PORT:
                self.mux.accept(event.stream)
                self.pending[event.stream] = bytearray()
            else:
                self.mux.reject(event.stream)
        elif isinstance(event, mux.Data) and event.stream in self.pending:
            self.mux.consumed(event.stream, len(event.payload))
            self.pending[event.stream] += event.payload
            self._echo(event.stream)
        elif isinstance(event, mux.Writable):
            self._echo(event.stream)
        elif isinstance(event, mux.HalfClosed):
            self.closing.add(event.stream)
            self._echo(event.stream)

    def _echo(self, stream: int) -> None:
        waiting = self.pending.get(stream)
        if waiting is None:
            return
        del waiting[: self.mux.send(stream, waiting)]
        if not waiting and stream in self.closing:
            self.mux.close_write(stream)

    def flush(self) -> None:
        # Two threads flush: frames must leave whole and in order.
        with self.sending:
            while True:
                with self.lock:
                    buffers = self.mux.outgoing()
                if not buffers:
                    return
                for buffer in buffers:
                    self.sock.sendall(buffer)

    def do(self, call: Callable[[], int | None]) -> int | None:
        with self.lock:
            result = call()
        self.flush()
        return result

    def wait_for(self, wanted: Callable[[mux.Event], bool], timeout_s: float = 10) -> mux.Event:
        with self.changed:
            deadline_s = time.monotonic() + timeout_s
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                assert self.changed.wait(deadline_s - time.monotonic()), f"not seen; there were {self.events}"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def guest(host: Host) -> Iterator[Guest]:
    guest = Guest(host.guest)
    yield guest
    host.guest.shutdown(socket.SHUT_RDWR)
    guest.thread.join(10)
    assert not guest.thread.is_alive()


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    sock.settimeout(30)
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def test_a_host_program_reaches_a_port_of_the_guest_and_half_close_travels(host: Host, guest: Guest) -> None:
    with connect(host.directory, PORT, 10) as sock:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"hello"


def test_megabytes_arrive_unchanged_on_several_streams_at_once(host: Host, guest: Guest) -> None:
    payloads = [random.Random(seed).randbytes(2 << 20) for seed in range(3)]
    answers: dict[int, bytes] = {}

    def talk(number: int) -> None:
        with connect(host.directory, PORT, 10) as sock:

            def send() -> None:
                sock.sendall(payloads[number])
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            answers[number] = read_all(sock)
            sender.join()

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] == payloads[number] for number in range(3)] == [True, True, True]


def test_a_port_that_nobody_serves_closes_the_connection(host: Host, guest: Guest) -> None:
    with pytest.raises(UnavailableError, match="does not answer on port 5"):
        connect(host.directory, 5, 10)


def test_a_connection_made_before_the_guest_is_up_waits_for_it(host: Host) -> None:
    connected: list[socket.socket] = []
    thread = threading.Thread(target=lambda: connected.append(connect(host.directory, PORT, 30)))
    thread.start()
    guest = Guest(host.guest)
    thread.join(20)
    assert len(connected) == 1
    connected[0].close()
    host.guest.shutdown(socket.SHUT_RDWR)
    guest.thread.join()


def test_a_guests_connect_arrives_at_the_socket_of_its_port(host: Host, guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guest_socket(host.directory, 2048)))
        listener.listen()
        listener.settimeout(10)
        stream = guest.do(lambda: guest.mux.open(2048))
        with listener.accept()[0] as sock:
            guest.wait_for(lambda event: isinstance(event, mux.Accepted) and event.stream == stream)
            sock.sendall(b"from the host")
            guest.wait_for(lambda event: isinstance(event, mux.Data) and bytes(event.payload) == b"from the host")


def test_a_guests_connect_to_a_port_without_a_listener_is_rejected(host: Host, guest: Guest) -> None:
    stream = guest.do(lambda: guest.mux.open(9))
    guest.wait_for(lambda event: isinstance(event, mux.Rejected) and event.stream == stream)


@pytest.mark.parametrize("line", [b"HELLO 1\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"C" * 64])
def test_a_wrong_connect_line_closes_the_connection(host: Host, guest: Guest, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(host.directory / "channel.sock"))
        sock.sendall(line)
        sock.settimeout(10)
        try:
            assert sock.recv(10) == b""
        except ConnectionResetError:
            pass  # the unread rest of the line was thrown away with the connection


def test_bytes_behind_the_connect_line_reach_the_guest(host: Host, guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(host.directory / "channel.sock"))
        sock.sendall(b"CONNECT %d\nearly" % PORT)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).partition(b"\n")[2] == b"early"


def test_a_host_program_that_leaves_resets_the_stream_when_the_guest_writes(host: Host, guest: Guest) -> None:
    sock = connect(host.directory, PORT, 10)
    sock.sendall(b"x" * 100)
    guest.wait_for(lambda event: isinstance(event, mux.Data))
    sock.close()
    guest.wait_for(lambda event: isinstance(event, (mux.Reset, mux.HalfClosed)))


def test_a_restarted_guest_closes_old_connections_and_takes_new_ones(host: Host, guest: Guest) -> None:
    with connect(host.directory, PORT, 10) as old:
        with guest.lock:
            guest.mux = mux.Mux(initiator=False)
        guest.flush()
        old.settimeout(10)
        assert old.recv(1) == b""
    with connect(host.directory, PORT, 10) as new:
        new.sendall(b"again")
        new.shutdown(socket.SHUT_WR)
        assert read_all(new) == b"again"


def test_random_bytes_from_a_guest_neither_end_the_host_nor_fill_its_memory(host: Host) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    noise = random.Random(7)
    stop = threading.Event()

    def drain() -> None:
        host.guest.settimeout(0.1)
        while not stop.is_set():
            try:
                if not host.guest.recv(65536):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        for _ in range(200):
            host.guest.send(noise.randbytes(65536))
    except OSError:
        pass  # the host gave this guest up, which is allowed
    stop.set()
    thread.join()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_guest_that_fills_streams_which_nobody_reads_takes_little_of_the_hosts_memory(
    host: Host, tmp_path: Path
) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(guest_socket(tmp_path, PORT)))
    listener.listen(1024)
    peer = mux.Mux(initiator=False)
    host.guest.settimeout(0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    opened: list[int] = []
    accepted: set[int] = set()
    try:
        while True:
            for buffer in peer.outgoing():
                host.guest.sendall(buffer)
            try:
                events = peer.receive(host.guest.recv(1 << 18))
            except TimeoutError:
                break  # it may send no more
            accepted |= {event.stream for event in events if isinstance(event, mux.Accepted)}
            if peer.synced and not opened:
                opened = [peer.open(PORT) for _ in range(1000)]
            for stream in accepted:
                sent += peer.send(stream, bytes(1 << 16))
    finally:
        listener.close()
    assert len(accepted) > 100
    assert not host.ended
    # The kernel's buffers between bridge and agent are not counted here.
    assert sent > 8 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 << 10


def test_a_guest_that_breaks_the_protocol_loses_its_channel_and_nothing_else(host: Host, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Host(tmp_path / "other")
    healthy = Guest(other.guest)
    try:
        rogue = Guest(host.guest)
        with connect(host.directory, PORT, 10):
            # Data beyond the credit it was given.
            opened = rogue.wait_for(lambda event: isinstance(event, mux.Opened))
            with rogue.lock:
                rogue.mux._streams[opened.stream].credit = 1 << 30
                rogue.mux._room_bytes = 1 << 30
                for _ in range(40):
                    rogue.mux.send(opened.stream, bytes(65536))
            try:
                rogue.flush()
            except OSError:
                pass  # cut off in the middle
            assert host.end.wait(10)
        assert isinstance(host.ended[0], ProtocolError)
        rogue.thread.join(10)
        with connect(other.directory, PORT, 10) as sock:
            sock.sendall(b"fine")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"fine"
    finally:
        other.guest.shutdown(socket.SHUT_RDWR)
        healthy.thread.join(10)
        other.close()


def test_closing_removes_the_socket(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert (tmp_path / "channel.sock").exists()
    host.close()
    assert os.listdir(tmp_path) == []
