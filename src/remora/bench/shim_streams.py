"""How fast a container's output gets through a shim, without what the container costs.

containerd's Go shim copies from the container's pipe to containerd's. Ours takes frames from the guest's channel (the
bridge and its mux) and has the kernel move a stream's bytes into the pipe; its microVM is left out here, and a process
takes its place that speaks the channel's protocol as fast as it can. Both write into a FIFO that the same code reads.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from remora.bench.shims import Bundles, Shim
from remora.errors import UnavailableError
from remora.reactor import Reactor
from remora.shim.streams import Streams
from remora.vmm.bridge import Bridge
from remora.vmm.channel import connect
from remora.wire import mux as wire
from remora.wire.guest_v1 import STDIO_PORT

_BLOCK = bytes(65536)
_MIB = 1 << 20
_PATIENCE_S = 120.0


def drain(fifo: int, size: int) -> float:
    """Read `size` bytes; returns seconds from the first to the last.

    Raises:
        UnavailableError: they did not come.
    """
    seen, begin, deadline_s = 0, 0.0, time.perf_counter() + _PATIENCE_S
    while seen < size:
        select.select([fifo], [], [], 1.0)
        try:
            data = os.read(fifo, _MIB)
        except BlockingIOError:
            data = b""
        if not data:
            # Nobody has opened the other end yet; to ask without a pause would take a processor from who is about to.
            time.sleep(0.001)
        seen += len(data)
        begin = begin or (time.perf_counter() if data else 0.0)
        if time.perf_counter() > deadline_s:
            raise UnavailableError(f"{seen} of {size} bytes of output came within {_PATIENCE_S:.0f} s")
    return time.perf_counter() - begin


def through(program: Path, bundles: Bundles, runtime_dir: Path, mib: int, kind: str) -> float:
    """Return MiB/s of a container's `dd` from the container to the reader of its FIFO."""
    bundle = bundles.make(kind, "dd", "if=/dev/zero", "bs=65536", f"count={16 * mib}")
    fifo = bundle / "stdout"
    os.mkfifo(fifo, 0o600)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Shim(program, bundle, runtime_dir) as shim:
            shim.start()
            shim.run(str(fifo))
            return mib / drain(reader, mib * _MIB)
    finally:
        os.close(reader)


def through_ours(mib: int) -> float:
    """Return MiB/s from a channel that is always full to the reader of the FIFO, through bridge and pump."""
    with tempfile.TemporaryDirectory(prefix="remora-bench-") as name:
        directory = Path(name)
        os.mkfifo(directory / "stdout", 0o600)
        reader = os.open(directory / "stdout", os.O_RDONLY | os.O_NONBLOCK)
        ours, guests = socket.socketpair()
        shim_pid = _forked(lambda: _shim(ours, directory), guests)
        guest_pid = _forked(lambda: _guest(guests, mib * _MIB), ours)
        ours.close()
        guests.close()
        try:
            return mib / drain(reader, mib * _MIB)
        finally:
            os.close(reader)
            for pid in (shim_pid, guest_pid):
                os.kill(pid, 9)
                os.waitpid(pid, 0)


def _forked(work: object, unused: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        unused.close()
        work()  # type: ignore[operator]
    except BaseException:  # noqa: BLE001 - a forked child must never return into the parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _shim(channel: socket.socket, directory: Path) -> None:
    """The part of the shim's server that output goes through, in one thread as there."""
    import threading

    reactor = Reactor()
    Bridge(reactor, channel, directory, on_end=lambda _error: reactor.stop())
    streams = Streams(reactor, "", str(directory / "stdout"), "", terminal=False)

    def attach() -> None:
        sock = connect(directory, STDIO_PORT, 10.0)
        reactor.post(lambda: streams.attach({"stdout": sock}))

    threading.Thread(target=attach, daemon=True).start()
    reactor.run()


def _guest(channel: socket.socket, size: int) -> None:
    """The other end of the channel: takes one stream and sends `size` bytes, as far as it has credit."""
    mux = wire.Mux(initiator=False)
    channel.setblocking(False)
    waiting: deque[memoryview] = deque()
    stream, left = -1, size
    while True:
        while stream >= 0 and left and (taken := mux.send(stream, _BLOCK[: min(left, len(_BLOCK))])):
            left -= taken
        waiting.extend(memoryview(data).cast("B") for data in mux.outgoing())
        _readable, writable, _ = select.select([channel], [channel] if waiting else [], [])
        if writable:
            _send(channel, waiting)
        if _readable:
            data = channel.recv(65536)
            if not data:
                return
            for event in mux.receive(data):
                if isinstance(event, wire.Opened):
                    mux.accept(event.stream)
                    stream = event.stream


def _send(channel: socket.socket, waiting: deque[memoryview]) -> None:
    try:
        while waiting:
            sent = channel.sendmsg([*waiting][:64])
            while waiting and sent >= len(waiting[0]):
                sent -= len(waiting.popleft())
            if sent:
                waiting[0] = waiting[0][sent:]
    except BlockingIOError:
        pass
