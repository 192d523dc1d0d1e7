"""The control service, `remora.guest.v1.Guest`: turns calls into what the other rooms of the guest do.

Any control call but Sync and Ping ends the pause that Sync began.
"""

from __future__ import annotations

from remora.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from remora.guest import facts, rootfs, system
from remora.guest.containers import MAIN
from remora.wire import guest_pod_v1, guest_v1
from remora.wire.guest_v1 import Empty, StartResponse, WaitReadyResponse, WaitResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional

    from remora.errors import RemoraError
    from remora.guest.containers import Containers
    from remora.guest.forwarder import Forwarder
    from remora.guest.pod import Pod
    from remora.guest.ready import Ready
    from remora.guest.running import Running
    from remora.guest.single import Single
    from remora.reactor import Reactor
    from remora.wire.ttrpc.calls import Call

#: After the container was killed; a process that no kill can end must not keep the VM.
_SHUTDOWN_S = 2.0
_KEEPS_PAUSE = ("Sync", "Ping")


class Control:
    """Args:
    when_drained: The channel's: calls back once everything sent so far is with the host's VMM.
    restart: Ends the VM.
    """

    def __init__(
        self,
        reactor: Reactor,
        containers: Containers,
        single: Single,
        pod: Pod,
        ready: Ready,
        forwarder: Forwarder,
        when_drained: Callable[[Callable[[], None]], None],
        restart: Callable[[], None] = system.restart,
    ) -> None:
        self._reactor = reactor
        self._containers = containers
        self._single = single
        self._pod = pod
        self._ready = ready
        self._forwarder = forwarder
        self._when_drained = when_drained
        self._restart = restart
        self._held = False
        self._methods: Dict[str, Callable[[Call, Any], None]] = {
            "Setup": self._setup,
            "Start": self._start,
            "Wait": self._wait,
            "Signal": self._signal,
            "Resize": self._resize,
            "CloseStdin": self._close_stdin,
            "Stats": self._stats,
            "Devices": self._devices,
            "WaitReady": self._wait_ready,
            "Resume": self._resume,
            "Sync": self._sync,
            "Shutdown": self._shutdown,
            "Ping": self._ping,
        }

    def handle(self, call: Call) -> None:
        """Answer one call; a RemoraError that this raises is the answer."""
        if call.service == guest_pod_v1.SERVICE:
            self._pod.handle(call)
            return
        method = self._methods.get(call.method) if call.service == guest_v1.SERVICE else None
        if method is None:
            raise UnimplementedError(f"the guest has no method {call.service}/{call.method}")
        if self._held and call.method not in _KEEPS_PAUSE:
            self.hold(False)
        method(call, guest_v1.METHODS[call.method][0].decode(call.payload))

    def hold(self, held: bool) -> None:
        """Stop, or go on, sending what processes write: while held, the channel stays silent by itself."""
        self._held = held
        self._forwarder.hold(held)
        for running in self._containers.running():
            running.stdio.hold(held)

    # -- methods ----------------------------------------------------------------------------------------------------

    def _setup(self, call: Call, request: guest_v1.SetupRequest) -> None:
        self._identify(request.identity)
        self._single.setup(request)
        call.respond(Empty())

    def _start(self, call: Call, request: guest_v1.StartRequest) -> None:
        if request.process is None:
            raise InvalidArgumentError("Start names no process")
        running: Running

        def done(error: Optional[RemoraError]) -> None:
            if error is not None:
                call.fail(error)
            else:
                call.respond(StartResponse(pid=running.pid))

        running = self._single.start(request.id, request.process, done)

    def _wait(self, call: Call, request: guest_v1.WaitRequest) -> None:
        running = self._containers.find(request.id)

        def finished() -> None:
            # A second answer is none.
            call.respond(
                WaitResponse(
                    exit_status=running.exit_status or 0, oom_killed=running.oom_killed, oom_kills=running.oom_kills
                )
            )

        def bound() -> None:
            self._reactor.call_later(request.drain_s, finished)

        if request.drain_s > 0:
            running.when_ended(bound)
        running.when_finished(finished)

    def _signal(self, call: Call, request: guest_v1.SignalRequest) -> None:
        self._containers.owner(request.id).signal(request.id, request.signal, request.all)
        call.respond(Empty())

    def _resize(self, call: Call, request: guest_v1.ResizeRequest) -> None:
        stdio = self._containers.find(request.id).stdio
        if not stdio.terminal:
            raise FailedPreconditionError(f"process {request.id!r} has no terminal", fix="start it with one")
        if not (0 < request.rows < 1 << 16 and 0 < request.columns < 1 << 16):
            raise InvalidArgumentError(f"a terminal of {request.rows} rows, {request.columns} columns: 1 to 65535 each")
        stdio.resize(request.rows, request.columns)
        call.respond(Empty())

    def _close_stdin(self, call: Call, request: guest_v1.CloseStdinRequest) -> None:
        self._containers.find(request.id).stdio.close_input()
        call.respond(Empty())

    def _stats(self, call: Call, _request: Empty) -> None:
        call.respond(facts.stats())

    def _ping(self, call: Call, _request: Optional[Empty] = None) -> None:
        call.respond(Empty())

    def _devices(self, call: Call, _request: Empty) -> None:
        main = [running for running in self._containers.running() if running.name == MAIN and running.alive]
        call.respond(facts.devices(f"/proc/{main[0].pid}/root/dev" if main else "/dev"))

    def _wait_ready(self, call: Call, _request: Empty) -> None:
        answered = False

        def answer() -> None:
            nonlocal answered
            if not answered:
                answered = True
                call.respond(WaitReadyResponse())

        def main_ended() -> None:
            nonlocal answered
            if not answered:
                answered = True
                self._ready.forget(answer)
                status = main.exit_status
                call.fail(
                    FailedPreconditionError(
                        f"the function ended with status {status} before it called remora.ready()",
                        fix="call remora.ready() once it has loaded what its clones share",
                    )
                )

        main = self._containers.find(MAIN)
        self._ready.when_ready(answer)
        if not answered:
            main.when_finished(main_ended)

    def _resume(self, call: Call, request: guest_v1.Identity) -> None:
        self._identify(request)
        self._forwarder.reset()
        self._ready.go()
        call.respond(Empty())

    def _sync(self, call: Call, _request: Empty) -> None:
        self.hold(True)
        self._when_drained(lambda: self._ping(call))

    def _shutdown(self, call: Call, _request: Empty) -> None:
        self._containers.kill_everything()
        running = [running for running in self._containers.running() if running.alive]
        left = len(running)

        def end() -> None:
            call.respond(Empty())
            # The answer needs the loop's next turns to reach the host.
            self._reactor.call_later(0.05, self._restart)

        def one_ended() -> None:
            nonlocal left
            left -= 1
            if not left:
                timer.cancel()
                end()

        if not left:
            end()
            return
        timer = self._reactor.call_later(_SHUTDOWN_S, end)
        for each in running:
            each.when_finished(one_ended)

    @staticmethod
    def _identify(identity: Optional[guest_v1.Identity]) -> None:
        if identity is None:
            rootfs.set_hostname("")
            return
        system.identify(identity)
        rootfs.set_hostname(identity.hostname or identity.sandbox)
