"""A process's standard streams: pipes or a terminal on one side, streams of channel port 1025 on the other.

A host attaches a stream by its first line, `<process id> <stdin|stdout|stderr|tty>`, before or after the process
starts, and again after the channel was cut. The process notices none of this; at most it waits.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios

from remora.guest import system
from remora.guest.pumps import FromDescriptor, ToDescriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

    from remora.guest.streams import Stream
    from remora.reactor import Reactor

NAMES = ("stdin", "stdout", "stderr", "tty")
#: Of an attaching line; process ids are at most 128 characters.
_MAX_LINE_BYTES = 256
#: Streams that name no process yet. A host attaches at most four per process it is about to start.
_MAX_PARKED = 64
#: Room for output nobody has taken yet; beyond it the process waits.
_PIPE_BYTES = 256 * 1024
#: Terminals take signals from these only, unless a program has chosen a printable one.
_CONTROL_CHARACTERS = frozenset(range(32)) | {127}


class Stdio:
    """The streams of one process. `for_child` are the descriptors it is to get; close them once it runs."""

    def __init__(self, reactor: Reactor, *, terminal: bool, stdin: bool) -> None:
        self._reactor = reactor
        self.terminal = terminal
        self._inputs: Dict[str, ToDescriptor] = {}
        self._outputs: Dict[str, FromDescriptor] = {}
        self._master = -1
        self._size = (0, 0)
        #: Called with (process group, signal) after the terminal has sent it.
        self.on_interrupt: Callable[[int, int], None] = _no_interrupt
        self._child: List[int] = []
        if terminal:
            self.for_child = (system.null(), system.null(), system.null())
            return
        child_in = system.null()
        if stdin:
            child_in, write_end = os.pipe2(os.O_CLOEXEC)
            self._child.append(child_in)
            self._inputs["stdin"] = ToDescriptor(reactor, write_end, self._close_input)
        outputs = []
        for name in ("stdout", "stderr"):
            read_end, child_out = os.pipe2(os.O_CLOEXEC)
            fcntl.fcntl(child_out, 1031, _PIPE_BYTES)  # F_SETPIPE_SZ, which Python 3.9 does not name
            self._child.append(child_out)
            outputs.append(child_out)
            self._outputs[name] = FromDescriptor(reactor, read_end)
        self.for_child = (child_in, outputs[0], outputs[1])

    def child_has_them(self) -> None:
        """Close the child's ends here, so that the last process to close one ends the stream."""
        for fd in self._child:
            os.close(fd)
        self._child.clear()

    def terminal_opened(self, master: int) -> None:
        """crun has made the terminal; its other end is this descriptor."""
        self._master = master
        if self._size != (0, 0):
            self.resize(*self._size)
        self._outputs["tty"] = FromDescriptor(self._reactor, os.dup(master))
        self._inputs["tty"] = ToDescriptor(self._reactor, os.dup(master), _nothing)

    def attach(self, name: str, stream: Stream) -> bool:
        """Connect a stream; False if this process has no such one."""
        output = self._outputs.get(name)
        into = self._inputs.get(name)
        if output is None and into is None:
            return False
        if into is not None:
            into.attach(stream)
            if name == "tty":
                stream.on_data = lambda data: self._typed(into, data)
        else:
            stream.ignore_input()
        if output is not None:
            output.attach(stream)
        stream.on_reset = lambda: self._detach(name, stream)
        return True

    def resize(self, rows: int, columns: int) -> None:
        self._size = (rows, columns)
        if self._master >= 0:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close_input(self) -> None:
        """End of file for the process, once it has read what was sent."""
        if "stdin" in self._inputs:
            self._inputs["stdin"].finish()

    def hold(self, held: bool) -> None:
        for output in self._outputs.values():
            output.hold(held)

    def when_handed_over(self, callback: Callable[[], None]) -> None:
        """Call once, after the process has ended: all that it wrote is with the streams that are attached."""
        waiting = [output for output in self._outputs.values() if not output.ended]
        left = len(waiting)
        if not left:
            callback()
            return

        def one_empty() -> None:
            nonlocal left
            left -= 1
            if not left:
                callback()

        for output in waiting:
            output.when_empty(one_empty)

    def process_ended(self) -> None:
        """Nobody reads any more: let go of what would feed the process."""
        for into in self._inputs.values():
            into.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _typed(self, into: ToDescriptor, data: memoryview) -> None:
        into.feed(data)
        if self._master < 0 or not (_CONTROL_CHARACTERS & set(data)):
            return
        attributes = termios.tcgetattr(self._master)
        if attributes[3] & termios.ISIG:
            group = struct.unpack("i", fcntl.ioctl(self._master, termios.TIOCGPGRP, bytes(4)))[0]
            for index, number in ((termios.VINTR, signal.SIGINT), (termios.VQUIT, signal.SIGQUIT)):
                if attributes[6][index] in bytes(data):
                    self.on_interrupt(group, number)

    def close(self) -> None:
        self.child_has_them()
        self.process_ended()
        for output in self._outputs.values():
            if output.stream is not None and not output.ended:
                output.stream.reset()
            output.close()

    def _close_input(self) -> None:
        self._inputs["stdin"].close()

    def _detach(self, name: str, stream: Stream) -> None:
        output = self._outputs.get(name)
        if output is not None and output.stream is stream:
            output.detach()
        into = self._inputs.get(name)
        if into is not None:
            into.detach(stream)


def _nothing() -> None:
    pass


def _no_interrupt(_group: int, _number: int) -> None:
    pass


class Attaching:
    """Takes new streams of port 1025 to the process that their first line names."""

    def __init__(self, find: Callable[[str], Optional[Stdio]]) -> None:
        self._find = find
        self._parked: Dict[Tuple[str, str], Tuple[Stream, bytes, bool]] = {}

    def accept(self, stream: Stream) -> None:
        line = bytearray()

        def data(piece: memoryview) -> None:
            line.extend(piece)
            head, newline, rest = bytes(line).partition(b"\n")
            if not newline:
                if len(line) > _MAX_LINE_BYTES:
                    stream.reset()
                return
            stream.consumed(len(head) + 1)
            process, _, name = head.decode(errors="replace").partition(" ")
            if name not in NAMES:
                stream.reset()
                return
            self._take(process, name, stream, rest)

        stream.on_data = data
        stream.on_eof = stream.reset

    def started(self, process: str, stdio: Stdio) -> None:
        """Connect the streams that came before the process."""
        for name in NAMES:
            parked = self._parked.pop((process, name), None)
            if parked is not None:
                _connect(stdio, name, *parked)

    def _take(self, process: str, name: str, stream: Stream, rest: bytes) -> None:
        stdio = self._find(process)
        if stdio is not None:
            _connect(stdio, name, stream, rest, False)
            return
        if len(self._parked) >= _MAX_PARKED:
            stream.reset()
            return
        key = (process, name)
        before = self._parked.pop(key, None)
        if before is not None:
            before[0].reset()
        self._parked[key] = (stream, rest, False)

        def more(piece: memoryview) -> None:
            _stream, kept, ended = self._parked[key]
            self._parked[key] = (stream, kept + bytes(piece), ended)  # bounded: no credit is given back yet

        def ended() -> None:
            self._parked[key] = (stream, self._parked[key][1], True)

        stream.on_data = more
        stream.on_eof = ended
        stream.on_reset = lambda: self._parked.pop(key, None) and None


def _connect(stdio: Stdio, name: str, stream: Stream, rest: bytes, ended: bool) -> None:
    if not stdio.attach(name, stream):
        stream.reset()
        return
    if rest:
        stream.on_data(memoryview(rest))
    if ended:
        stream.on_eof()
