"""PID 1's streams on real descriptors, without a microVM: both ends run on one reactor, over a real mux and over
sockets as vsock gives them (Unix ones here; tests/e2e/guest has real AF_VSOCK)."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from remora.guest.channel import Channel
from remora.guest.forwarder import DOORS, Forwarder
from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.guest.ready import Ready
from remora.guest.stdio import Attaching, Stdio
from remora.guest.streams import Stream
from remora.guest.vsock import VsockChannel
from remora.reactor import Reactor
from remora.wire.guest_v1 import STDIO_PORT


class Ends:
    """Guest and host of one channel. `until` runs both."""

    def __init__(self, folder: Path | None = None) -> None:
        """With a folder: over sockets there; without: over the mux."""
        self.errors: list[BaseException] = []
        self.reactor = Reactor(on_error=self.errors.append)
        self.sockets = list(socket.socketpair())
        self.served: list[Stream] = []
        self.stdio: dict[str, Stdio] = {}
        self.attaching = Attaching(self.stdio.get)
        self.restarts = 0
        services = {7: self.served.append, STDIO_PORT: self.attaching.accept}
        self.accelerator: list[Stream] = []
        self.agent_got = bytearray()
        self.agent_eof: list[bool] = []
        doors = dict.fromkeys(DOORS.values(), self._serve_accelerator)
        self.guest: Channel | VsockChannel
        self.host: Channel | VsockChannel
        if folder is None:
            self.guest = Channel(self.reactor, self.sockets[0].fileno(), services, self._restarted)
            self.host = self.new_host(self.sockets[1])
        else:
            self.guest = self._over_sockets(folder, "guest", "host", services)
            self.host = self._over_sockets(folder, "host", "guest", doors)

    def _over_sockets(
        self, folder: Path, here: str, there: str, services: Mapping[int, Callable[[Stream], None]]
    ) -> VsockChannel:
        def listening(port: int) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.bind(str(folder / f"{here}_{port}"))
            sock.listen()
            return sock

        def dialling(port: int) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(str(folder / f"{there}_{port}"))
            except OSError:
                sock.close()
                raise
            return sock

        return VsockChannel(
            self.reactor,
            services,
            self._restarted,
            listening=listening,
            dialling=dialling,
            trusted=lambda _address: True,
        )

    def new_host(self, sock: socket.socket) -> Channel:
        return Channel(
            self.reactor, sock.fileno(), dict.fromkeys(DOORS.values(), self._serve_accelerator), initiator=True
        )

    def _serve_accelerator(self, stream: Stream) -> None:
        stream.on_data = self.agent_got.extend
        stream.on_eof = lambda: self.agent_eof.append(True)
        self.accelerator.append(stream)

    def _restarted(self) -> None:
        self.restarts += 1

    def until(self, done: Callable[[], object], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, "nothing more happened"
            self.reactor.run_once(0.1)

    def settle(self) -> None:
        """Run until nothing is left to do at once."""
        quiet = []
        self.reactor.call_later(0.05, lambda: quiet.append(True))
        self.until(lambda: quiet)

    def open(self, port: int) -> tuple[Stream, bytearray]:
        stream = self.host.open(port)
        got = bytearray()

        def data(piece: memoryview) -> None:
            got.extend(piece)
            stream.consumed(len(piece))

        stream.on_data = data
        accepted: list[bool] = []
        stream.on_accepted = lambda: accepted.append(True)
        self.until(lambda: accepted)
        return stream, got

    def attach(self, process: str, name: str) -> tuple[Stream, bytearray]:
        stream, got = self.open(STDIO_PORT)
        assert stream.send(f"{process} {name}\n".encode())
        return stream, got

    def close(self) -> None:
        for stdio in self.stdio.values():
            stdio.close()
        for end in (self.guest, self.host):
            if isinstance(end, VsockChannel):
                end.close()
        self.reactor.close()
        for sock in self.sockets:
            sock.close()


def fill(pipe: int) -> int:
    """Write until the pipe takes no more; return how much it took."""
    written = 0
    try:
        while True:
            written += os.write(pipe, b"x" * 4096)
    except BlockingIOError:
        return written


@pytest.fixture(params=["mux", "sockets"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with tempfile.TemporaryDirectory() as folder:
        both = Ends(Path(folder) if request.param == "sockets" else None)
        yield both
        both.close()
        assert both.errors == []


@pytest.fixture
def mux_ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()
    assert both.errors == []


def test_a_port_that_nobody_serves_is_rejected(ends: Ends) -> None:
    stream = ends.host.open(99)
    gone: list[bool] = []
    stream.on_reset = lambda: gone.append(True)
    ends.until(lambda: gone)
    assert not stream.open


def test_output_stops_the_writer_while_nobody_is_attached_and_none_is_lost(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    pump = FromDescriptor(ends.reactor, read_end)
    written = fill(write_end)
    stream, got = ends.open(7)
    pump.attach(ends.served[0])
    ends.until(lambda: len(got) == written)
    eof: list[bool] = []
    stream.on_eof = lambda: eof.append(True)
    os.close(write_end)
    ends.until(lambda: eof)
    assert pump.ended


def test_output_goes_on_where_it_was_when_a_stream_broke_off(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    pump = FromDescriptor(ends.reactor, read_end)
    first, got_first = ends.open(7)
    pump.attach(ends.served[0])
    ends.served[0].on_reset = pump.detach
    os.write(write_end, b"one")
    ends.until(lambda: got_first == b"one")
    first.reset()
    ends.until(lambda: pump.stream is None)
    os.write(write_end, b"two")
    ends.settle()
    _, got_second = ends.open(7)
    pump.attach(ends.served[1])
    os.close(write_end)
    ends.until(lambda: got_second == b"two")


def test_a_held_pump_sends_nothing_until_it_is_let_go(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    pump = FromDescriptor(ends.reactor, read_end)
    _, got = ends.open(7)
    pump.attach(ends.served[0])
    pump.hold(True)
    os.write(write_end, b"later")
    ends.settle()
    assert got == b""
    pump.hold(False)
    ends.until(lambda: got == b"later")
    os.close(write_end)
    pump.close()


def test_a_slow_reader_holds_the_peer_back(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    stream, _ = ends.open(7)
    ended: list[bool] = []
    sink = ToDescriptor(ends.reactor, write_end, lambda: ended.append(True))
    sink.attach(ends.served[0])
    sent = 0
    while taken := stream.send(b"y" * 65536):
        sent += taken
        ends.settle()
    assert sent < 1 << 20  # a window and a pipe, no more
    stream.close_write()
    got = 0
    while got < sent:
        got += len(os.read(read_end, 65536))
        ends.reactor.run_once(0)
    ends.until(lambda: ended)
    os.close(read_end)
    sink.close()


def test_a_dead_reader_does_not_hold_the_peer_back(ends: Ends) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream, _ = ends.open(7)
    sink = ToDescriptor(ends.reactor, write_end, lambda: None)
    sink.attach(ends.served[0])
    sent = 0

    def send() -> bool:
        nonlocal sent
        sent += stream.send(b"z" * 65536)
        return sent > 1 << 21

    ends.until(send)
    sink.close()


def test_a_new_host_resets_all_streams_and_is_told_apart(mux_ends: Ends) -> None:
    mux_ends.open(7)
    reset: list[bool] = []
    mux_ends.served[0].on_reset = lambda: reset.append(True)
    mux_ends.reactor.unregister(mux_ends.sockets[1].fileno())
    mux_ends.host = mux_ends.new_host(mux_ends.sockets[1])  # same wire, another process: a new epoch
    mux_ends.until(lambda: reset)
    assert mux_ends.restarts
    mux_ends.settle()
    mux_ends.open(7)
    assert len(mux_ends.served) == 2


def test_a_host_that_breaks_the_rules_ends_the_streams_and_not_the_guest(mux_ends: Ends) -> None:
    from remora.wire import mux_frames

    mux_ends.open(7)
    reset: list[bool] = []
    mux_ends.served[0].on_reset = lambda: reset.append(True)
    mux_ends.sockets[1].send(mux_frames.frame(mux_frames.WINDOW, 4001, 1))
    mux_ends.until(lambda: reset)
    assert len(mux_ends.errors) == 1
    mux_ends.errors.clear()
    mux_ends.settle()
    mux_ends.open(7)


def test_one_streams_fault_costs_no_other_stream_its_events(ends: Ends) -> None:
    bad, _ = ends.open(7)
    good, _ = ends.open(7)
    got = bytearray()

    def fail(_data: memoryview) -> None:
        raise ValueError("a fault")

    ends.served[0].on_data = fail
    ends.served[1].on_data = got.extend
    bad.send(b"x")
    good.send(b"hello")
    ends.until(lambda: got == b"hello")
    ends.until(lambda: not bad.open)
    assert [type(error) for error in ends.errors] == [ValueError]
    ends.errors.clear()


def test_streams_attach_before_and_after_the_process_starts(ends: Ends) -> None:
    early, _ = ends.attach("p", "stdin")
    early.send(b"in")
    early.close_write()
    ends.settle()
    stdio = ends.stdio["p"] = Stdio(ends.reactor, terminal=False, stdin=True)
    ends.attaching.started("p", stdio)
    child_in, child_out, _ = stdio.for_child
    os.write(child_out, b"out")
    _, got = ends.attach("p", "stdout")
    ends.until(lambda: got == b"out")
    assert os.read(child_in, 10) == b"in"
    ends.settle()
    stdio.child_has_them()


@pytest.mark.parametrize("line", [b"p stdxxx\n", b"x" * 300])
def test_a_bad_first_line_resets_the_stream(ends: Ends, line: bytes) -> None:
    stream, _ = ends.open(STDIO_PORT)
    stream.send(line)
    ends.until(lambda: not stream.open)


def test_a_host_cannot_park_streams_without_bound(ends: Ends) -> None:
    streams = [ends.attach(f"p{number}", "stdin")[0] for number in range(65)]
    ends.until(lambda: not streams[-1].open)
    assert streams[0].open


def test_the_end_of_a_process_waits_for_its_output(ends: Ends) -> None:
    stdio = ends.stdio["p"] = Stdio(ends.reactor, terminal=False, stdin=False)
    os.write(stdio.for_child[1], b"o" * 100_000)
    stdio.child_has_them()
    stream = ends.host.open(STDIO_PORT)
    accepted: list[bool] = []
    stream.on_accepted = lambda: accepted.append(True)
    held: list[int] = []
    stream.on_data = lambda piece: held.append(len(piece))
    ends.until(lambda: accepted)
    stream.send(b"p stdout\n")
    ends.until(lambda: held)
    finished: list[bool] = []
    stdio.when_handed_over(lambda: finished.append(True))
    stdio.when_handed_over(lambda: finished.append(True))  # two may ask
    ends.until(lambda: len(finished) == 2)
    ends.until(lambda: sum(held) == 100_000)


@pytest.mark.parametrize("door", DOORS)
def test_the_forwarder_connects_to_the_accelerators_port(ends: Ends, tmp_path: Path, door: str) -> None:
    forwarder = Forwarder(ends.reactor, str(tmp_path), ends.guest)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / door))
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        ends.until(lambda: ends.agent_eof)
        agent = ends.accelerator[0]
        assert ends.agent_got == b"request"
        agent.send(b"answer")
        agent.close_write()
        client.setblocking(False)
        answer = bytearray()

        def closed() -> bool:
            try:
                part = client.recv(100)
            except BlockingIOError:
                return False
            answer.extend(part)
            return not part

        ends.until(closed)
        assert answer == b"answer"
    forwarder.close()


def test_ready_holds_a_templates_function_until_go(ends: Ends, tmp_path: Path) -> None:
    ready = Ready(ends.reactor, str(tmp_path / "guest.sock"), template=True)
    with socket.socket(socket.AF_UNIX) as function:
        function.connect(str(tmp_path / "guest.sock"))
        function.sendall(b"READY\n")
        told: list[bool] = []
        ready.when_ready(lambda: told.append(True))
        ends.until(lambda: told)
        function.setblocking(False)
        with pytest.raises(BlockingIOError):
            function.recv(1)
        ready.go()
        ends.settle()
        line = function.recv(200)
    assert line.startswith(b"GO ")
    assert len(bytes.fromhex(line[3:].decode())) == 32
    ready.close()


def test_ready_answers_at_once_without_a_template_and_hangs_up_on_anything_else(ends: Ends, tmp_path: Path) -> None:
    ready = Ready(ends.reactor, str(tmp_path / "guest.sock"), template=False)
    answers = []
    for line in (b"READY\n", b"hello\n"):
        with socket.socket(socket.AF_UNIX) as function:
            function.connect(str(tmp_path / "guest.sock"))
            function.sendall(line)
            ends.settle()
            answers.append(function.recv(200)[:3])
    assert answers == [b"GO ", b""]
    ready.close()


def test_a_burst_is_sent_whole_though_the_writer_says_no_more(ends: Ends) -> None:
    stdio = ends.stdio["p"] = Stdio(ends.reactor, terminal=False, stdin=False)
    _, got = ends.attach("p", "stdout")
    ends.settle()
    burst = bytes(256 * 1024)  # as much as the pump reads in one turn of the loop, and the pipe holds
    assert os.write(stdio.for_child[1], burst) == len(burst)
    ends.until(lambda: len(got) == len(burst))
    stdio.child_has_them()


def test_who_attaches_after_the_end_gets_the_end(ends: Ends) -> None:
    stdio = ends.stdio["p"] = Stdio(ends.reactor, terminal=False, stdin=False)
    ends.attach("p", "stdout")
    stdio.child_has_them()
    ends.settle()
    stream, got = ends.attach("p", "stdout")
    eof: list[bool] = []
    stream.on_eof = lambda: eof.append(True)
    ends.until(lambda: eof)
    assert got == b""


def test_a_client_that_reads_no_more_may_still_send(ends: Ends, tmp_path: Path) -> None:
    forwarder = Forwarder(ends.reactor, str(tmp_path), ends.guest)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "accel.sock"))
        ends.until(lambda: ends.accelerator)
        client.shutdown(socket.SHUT_RD)
        agent = ends.accelerator[0]
        agent.send(b"nobody reads this")
        ends.settle()
        agent.send(b"nor this")
        agent.close_write()
        ends.settle()
        client.sendall(b"still here")
        ends.until(lambda: ends.agent_got == b"still here")
    ends.until(lambda: ends.agent_eof)
    forwarder.close()


def test_killing_the_client_ends_the_agents_stream(ends: Ends, tmp_path: Path) -> None:
    forwarder = Forwarder(ends.reactor, str(tmp_path), ends.guest)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "accel.sock"))
        ends.until(lambda: ends.accelerator)
    ends.until(lambda: ends.agent_eof)
    ends.accelerator[0].close_write()
    ends.until(lambda: not forwarder.connections)
    forwarder.close()
