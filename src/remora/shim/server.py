"""The pod's server: the process that `start` leaves behind, from its first call to the pod's end."""

from __future__ import annotations

import os
import signal
import socket
import sys

from remora.reactor import Reactor
from remora.shim import memory
from remora.shim.events import Publisher
from remora.shim.service import TaskService
from remora.vmm.process import name_process
from remora.wire.ttrpc.listener import listen
from remora.wire.ttrpc.reactor import ServerConnection

#: A server that nobody asks to create anything was left by a containerd that died in between.
IDLE_S = 60.0
#: How long the last events may take.
FAREWELL_S = 3.0


def serve(listener_fd: int, path: str, bundle: str, flags: dict[str, str]) -> None:
    """Serve the pod whose socket listens as `listener_fd` until it is shut down. Main thread only."""
    name_process("remora-shim")
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    _raise_oom_score()
    memory.share_arena()
    reactor = Reactor(_log)
    publisher = Publisher(os.environ.get("TTRPC_ADDRESS", ""), flags.get("namespace", "default"))
    service = TaskService(reactor, publisher, path, reactor.stop)
    listener = listen(
        reactor,
        socket.socket(fileno=listener_fd),
        lambda sock: ServerConnection(reactor, sock, service.handle),
    )
    reactor.on_signal(signal.SIGTERM, reactor.stop)

    def idle() -> None:
        if not service.created:
            reactor.stop()

    reactor.call_later(IDLE_S, idle)
    try:
        reactor.run()
    finally:
        listener.close()
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # `delete` was faster
        service.pod.kill()
        # Not the reactor's work any more: it has stopped, so that whoever waits for it would wait for ever.
        service.pod.close()
        publisher.close(FAREWELL_S)


def _raise_oom_score() -> None:
    """Rather the pod than containerd, whose score we have inherited (as containerd's own shims do)."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            score = min(int(file.read()) + 1, 1000)
            file.seek(0)
            file.write(str(score))
    except OSError:
        pass  # a container may not


def _log(error: BaseException) -> None:
    """Write to containerd's log; what it does not take at once is dropped."""
    try:
        print(f"remora shim: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not hasattr(error, "code"):
            import traceback

            traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    except OSError:
        pass  # containerd is restarting
