"""One worker process as the agent sees it: two sockets, a pidfd, the last words on stderr, and an end.

It knows datagrams, not jobs. Whatever ends first (a socket, the process, the patience of its owner) ends it once: the
process is killed, and `on_death` is called from the loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

from remora.errors import ProtocolError, RemoraError
from remora.reactor import READ, WRITE, Reactor, Timer
from remora.workers import launcher
from remora.workers.cells import Cell
from remora.workers.cgroups import Bounds
from remora.workers.packed import ANSWER, unpack_answer
from remora.workers.protocol import MAX_MESSAGE_BYTES, Message, decode, encode, unpack
from remora.workers.settings import WorkerSettings

_LAST_WORDS_BYTES = 2048
#: A worker that writes more than this to stderr is no longer listened to.
_STDERR_BYTES = 1 << 20
_SOCKET_BYTES = 1 << 20
#: How long to wait for the pid of a worker that is killed while bubblewrap starts it; it takes a few milliseconds.
_INFO_S = 1.0
#: How long after its sockets a process may take to end.
_STATUS_S = 0.5
#: How long the kernel may take to clear up after a dead worker until its control group is looked at again.
_CLEAR_S = 0.05


class WorkerProcess:
    """A started worker. `owner` gets its messages; before somebody owns it, only `hello` is expected."""

    _ids = count(1)

    def __init__(
        self,
        reactor: Reactor,
        settings: WorkerSettings,
        make_cell: Callable[[str], Cell] = Cell,
        libraries: Sequence[int] = (),
    ) -> None:
        self.id = f"w{next(self._ids)}"
        self.ready = False
        self.dead = False
        self.started_s = time.monotonic()
        self.on_ready: Callable[[], None] = lambda: None
        #: Called once, when the process is ready or will never be.
        self.on_started: Callable[[], None] = lambda: None
        self.on_message: Callable[[Message], None] = _unexpected
        self.on_death: Callable[[str], None] = lambda _reason: None
        self._reactor = reactor
        self._stderr_bytes = 0
        self._last_words = b""
        #: One of its sockets has ended: it takes no more jobs, and its exit status tells why.
        self.leaving = False
        self._start_timer: Timer | None = None
        self._info_fd = -1
        with contextlib.ExitStack() as theirs:
            self._jobs, jobs_fd = _pair(theirs)
            self._control, control_fd = _pair(theirs)
            self._stderr, stderr_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            theirs.callback(os.close, stderr_fd)
            os.set_blocking(stderr_fd, True)
            info_fd = None
            if settings.confinement == "bubblewrap":
                self._info_fd, info_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                theirs.callback(os.close, info_fd)
            # RLIMIT_NPROC counts per user namespace; without one it would count all of the operator's processes.
            processes = settings.processes if settings.confinement == "bubblewrap" else 0
            filtered = settings.seccomp and not launcher.gpu_devices(settings)
            numbers = (jobs_fd, control_fd, settings.open_files, processes, settings.model_bytes, settings.image_pixels)
            arguments = [str(int(number)) for number in (*numbers, filtered)]
            try:
                self._cell = make_cell(self.id)
                self._process = launcher.launch(
                    settings,
                    arguments,
                    (jobs_fd, control_fd),
                    stderr_fd,
                    info_fd,
                    prefix=self._cell.prefix(),
                    libraries=libraries,
                )
            except RemoraError:
                self._close_fds()
                raise
            self._processes = settings.processes
        self.pid = self._process.pid
        self._out: dict[socket.socket, deque[tuple[bytes, int]]] = {self._jobs: deque(), self._control: deque()}
        reactor.register(self._jobs.fileno(), READ, lambda events: self._ready(self._jobs, events))
        reactor.register(self._control.fileno(), READ, lambda events: self._ready(self._control, events))
        reactor.register(self._stderr, READ, lambda _events: self._listen())
        self._stop_watching = reactor.watch_pid(self._process.pid, self._ended)
        self._start_timer = reactor.call_later(settings.start_s, lambda: self.kill("it did not start in time"))

    def bound(self, memory_bytes: int, cpus: float) -> None:
        """Set what the process may use, 0 for no bound. Where that fails the process is killed."""
        try:
            self._cell.bound(Bounds(memory_bytes, self._processes, cpus))
        except RemoraError as error:
            self._die_soon(error.message)

    # -- sending ------------------------------------------------------------------------------------------------------

    def send_job(self, data: bytes) -> None:
        self._send(self._jobs, data, -1)

    def tell(self, message: Message, fd: int = -1) -> None:
        """Send on the control socket; `fd` is sent along and closed."""
        self._send(self._control, encode(message), fd)

    def _send(self, sock: socket.socket, data: bytes, fd: int) -> None:
        if self.dead or self.leaving:
            if fd >= 0:
                os.close(fd)
            return
        queue = self._out[sock]
        queue.append((data, fd))
        if len(queue) == 1:
            self._flush(sock)

    def _flush(self, sock: socket.socket) -> None:
        if self.dead or self.leaving:
            return
        queue = self._out[sock]
        while queue:
            data, fd = queue[0]
            try:
                if fd >= 0:
                    socket.send_fds(sock, [data], [fd])
                else:
                    sock.send(data)
            except BlockingIOError:
                self._reactor.modify(sock.fileno(), READ | WRITE)
                return
            except OSError:
                self._leave()
                return
            queue.popleft()
            if fd >= 0:
                os.close(fd)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _ready(self, sock: socket.socket, events: int) -> None:
        if events & WRITE and not self.dead:
            self._reactor.modify(sock.fileno(), READ)
            self._flush(sock)
        if self.dead or not events & ~WRITE:
            return
        # One datagram a turn: there is seldom a second one, and asking costs as much as being called again.
        try:
            # Plain recv: descriptors that a hostile worker attaches are dropped by the kernel.
            data = sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # reset: it died with messages unread
        if not data:
            self._reactor.unregister(sock.fileno())
            self._leave()
            return
        try:
            for part in unpack(data):
                if not self.dead:
                    self._take(unpack_answer(part) if part[0] == ANSWER else decode(part))
        except ProtocolError as error:
            self.kill(error.message)

    def _take(self, message: Message) -> None:
        if message["t"] != "hello":
            self.on_message(message)
            return
        if self.ready:
            raise ProtocolError("the worker said hello twice")
        self.ready = True
        if self._start_timer is not None:
            self._start_timer.cancel()
        self.pid = self._read_pid()
        self.on_ready()
        self.on_started()

    def _read_pid(self) -> int:
        """Return the worker's own pid, which bubblewrap (its parent) has written before starting it."""
        if self._info_fd < 0:
            return self.pid
        written = b""
        while b"}" not in written and select.select([self._info_fd], [], [], _INFO_S)[0]:
            part = os.read(self._info_fd, 4096)  # bubblewrap writes it in pieces
            if not part:
                break
            written += part
        try:
            return int(json.loads(written)["child-pid"])
        except (ValueError, KeyError):
            return self.pid

    def _listen(self) -> None:
        if self._stderr < 0:
            return
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._stderr, 65536)
        self._stderr_bytes += len(data)
        self._last_words = (self._last_words + data)[-_LAST_WORDS_BYTES:]
        if not data or self._stderr_bytes > _STDERR_BYTES:
            self._hang_up()

    # -- the end ------------------------------------------------------------------------------------------------------

    def last_words(self) -> str:
        """Return the last line that the worker wrote to stderr."""
        lines = self._last_words.decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def kill(self, reason: str) -> None:
        """End the process now, whatever it does. Harmless when it is dead."""
        if self.dead:
            return
        self.dead = True
        self._listen()
        self._signal()
        for queue in self._out.values():
            for _data, fd in queue:
                if fd >= 0:
                    os.close(fd)
            queue.clear()
        if self._start_timer is not None:
            self._start_timer.cancel()
        for fd in (self._jobs.fileno(), self._control.fileno()):
            self._reactor.unregister(fd)
        self._close_fds()
        words = self.last_words()
        self._reactor.call_soon(lambda: self.on_death(f"{reason} ({words})" if words else reason))
        if not self.ready:
            self._reactor.call_soon(lambda: self.on_started())

    @property
    def reaped(self) -> bool:
        return self._process.returncode is not None

    def wait(self) -> None:
        """Wait for a killed process and reap it."""
        self._stop_watching()
        self._process.wait()
        self._cell.remove()

    def _clear(self, attempts: int = 100) -> None:
        if not self._cell.remove() and attempts:
            self._reactor.call_later(_CLEAR_S, lambda: self._clear(attempts - 1))

    def _signal(self) -> None:
        # The worker first: one whose bubblewrap dies before letting it run waits for it forever, out of reach.
        if self._process.poll() is None:
            if self._info_fd >= 0 and not self.ready:
                self.pid = self._read_pid()
            if self.pid != self._process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self._process.kill()

    def _ended(self) -> None:
        status = self._process.wait()
        self.kill(self._cell.verdict() or _ending(status))
        self._clear()

    def _leave(self) -> None:
        """A socket has ended. The exit status comes next, and says more than that."""
        if not self.leaving:
            self.leaving = True
            self._reactor.call_later(_STATUS_S, lambda: self.kill("it closed its socket"))

    def _die_soon(self, reason: str) -> None:
        """Die from the loop, as a sender does not expect its worker to be gone on return."""
        self._reactor.call_soon(lambda: self.kill(reason))

    def _hang_up(self) -> None:
        """Close our end of stderr: who writes on gets EPIPE."""
        if self._stderr >= 0:
            self._reactor.unregister(self._stderr)
            os.close(self._stderr)
            self._stderr = -1

    def _close_fds(self) -> None:
        self._jobs.close()
        self._control.close()
        self._hang_up()
        if self._info_fd >= 0:
            os.close(self._info_fd)
            self._info_fd = -1


def _ending(status: int) -> str:
    """Say how a process ended; bubblewrap passes its child's end by signal on as 128 and the signal."""
    number = -status if status < 0 else status - 128
    try:
        return f"it was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"it exited with status {status}"


def _unexpected(_message: Message) -> None:
    raise ProtocolError("the worker spoke before it was asked")


def _pair(theirs: contextlib.ExitStack) -> tuple[socket.socket, int]:
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.enter_context(other)
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ours, other.fileno()


def memory_bytes(pid: int) -> int:
    """Return a process's resident memory, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0
