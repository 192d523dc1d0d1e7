"""The process that owns one sandbox: its QEMU, its channel, its attachment to the agent, its directory.

The main thread walks the sandbox through its life with plain blocking calls; it also starts QEMU, which therefore dies
with it. A second thread runs the reactor: the channel's bridge, the console, the leash to the maker, requests from
other commands, and the news that QEMU has ended. Whatever ends the sandbox calls `_abort`, which makes every blocking
call of the main thread fail; the first reason given is the one that is reported.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora.errors import RemoraError, UnavailableError
from remora.reactor import READ, Reactor
from remora.sandboxes import leash
from remora.sandboxes.agent_link import AgentLink
from remora.sandboxes.clearing import process_start
from remora.sandboxes.endings import why_ended
from remora.sandboxes.guest import MAIN, Guest, connect_when_up, identity, process
from remora.sandboxes.launch import Launch
from remora.sandboxes.output import OutputKeeper
from remora.sandboxes.registry import MONITOR_SOCKET, Record, write_state
from remora.vmm.bridge import Bridge
from remora.vmm.contract import Machine
from remora.vmm.drivers import driver
from remora.wire.guest_v1 import WaitResponse

MONITOR_TIMEOUT_S = 30.0
RESTORE_TIMEOUT_S = 30.0
#: How long a foreground maker may take to fetch the last output after `remora stop`.
FAREWELL_S = 5.0
MAX_FILES = 8192
#: How long QEMU may take to end once its sockets have closed.
EXPLAIN_S = 1.0


class Monitor:
    """One sandbox's life. Make it, then `run` it once."""

    def __init__(self, launch: Launch, fields: dict[str, Any], leash_sock: socket.socket) -> None:
        self._launch = launch
        self._record = Record(launch.id, launch.directory, dict(fields))
        self._leash = leash_sock
        self._reactor = Reactor()
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._reactor.run, name="reactor", daemon=True)
        self._machine: Machine | None = None
        self._bridge: Bridge | None = None
        self._link: AgentLink | None = None
        self._guest: Guest | None = None
        self._listener: socket.socket | None = None
        self._clients: set[socket.socket] = set()
        self._output: OutputKeeper | None = None
        self._released = False
        self._ending = threading.Event()
        self._reason_known = threading.Event()
        self._why: RemoraError | None = None
        self._stamps: dict[str, float] = {}
        self._warning = ""

    # -- the main thread: the sandbox's life ------------------------------------------------------------------------

    def run(self) -> None:
        """Boot or restore, serve until something ends the sandbox, and leave nothing running."""
        signal.signal(signal.SIGTERM, lambda _signum, _frame: self._abort(None))
        # A guest may open as many streams as the mux allows, each of them a socket here.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_FILES)), hard))
        try:
            self._listen()
            self._begin()
            while not self._ending.is_set():
                self._requests.get()()
        except Exception as error:  # noqa: BLE001 - the last stop of everything: reported to the maker
            if isinstance(error, UnavailableError) and self._thread.is_alive():
                # That the guest is gone shows here first; why it is gone, the reactor learns from QEMU's end.
                self._reason_known.wait(EXPLAIN_S)
            self._report_failure(self._why or error)
        finally:
            self._end()

    def _stamp(self, name: str) -> None:
        self._stamps[name] = round((time.monotonic() - self._launch.began_s) * 1000, 2)

    def _begin(self) -> None:
        launch = self._launch
        self._start_machine()
        self._thread.start()
        self._stamp("machine_started")
        self._attach()
        for last_try in (False, True):
            try:
                self._come_up(launch.boot_timeout_s * (2 if last_try else 1))
                break
            except UnavailableError:
                # A guest under emulation may hang while it boots (guest clock, busy host): once more, with more time.
                # One that has ended shows this way, too, a moment before QEMU's end is known.
                if last_try or launch.state_file is not None or self._reason_known.wait(EXPLAIN_S):
                    raise
                self._replace_machine()
                if self._ending.is_set():
                    # The maker left while there was no machine to kill.
                    raise
        if self._output is not None:
            self._output.follow_process(self._process_ended, self._abort)
        self._update(state="running", stamps=self._stamps)
        message = {"event": "started", "stamps": self._stamps, "warning": self._warning}
        leash.send(self._leash, message)

    def _come_up(self, timeout_s: float) -> None:
        launch = self._launch
        assert self._machine is not None
        self._machine.connect(MONITOR_TIMEOUT_S)
        who = identity(launch.id, launch.hostname)
        if launch.state_file is not None:
            self._machine.restore(launch.state_file, RESTORE_TIMEOUT_S)
            self._stamp("restored")
            self._guest = Guest(self._record.channel, timeout_s=timeout_s)
            self._stamp("guest_up")
            self._keep_output()
            self._guest.resume(who)
            self._stamp("resumed")
            return
        self._guest = connect_when_up(
            self._record.channel, timeout_s, gone=None if self._bridge else self._ending.is_set
        )
        self._stamp("guest_up")
        self._guest.setup(who, launch.layers, launch.mounts, readonly_root=launch.readonly_root)
        self._stamp("set_up")
        if launch.process is not None:
            self._guest.start(MAIN, process(launch.process))
            self._stamp("process_started")
            self._keep_output()

    def _keep_output(self) -> None:
        launch = self._launch
        if launch.detached:
            terminal = launch.process is not None and launch.process.terminal
            self._output = OutputKeeper(self._reactor, launch.directory, self._record.channel, terminal=terminal)

    def _process_ended(self, ended: WaitResponse) -> None:
        error = {"error": "the guest ran out of memory"} if ended.oom_killed else {}
        self._requests.put(lambda: self._update(exit_status=ended.exit_status, **error))
        self._requests.put(self._ending.set)

    def _attach(self) -> None:
        spec = self._launch.attach
        if spec is None:
            return
        self._link = AgentLink(spec, self._launch.id, self._record.channel)
        try:
            self._link.attach()
            self._stamp("attached")
        except RemoraError as error:
            self._warning = str(error)

    def _end(self) -> None:
        """Stop everything that belongs to the sandbox. Its files are the keeper's business."""
        self._ending.set()
        if self._machine is not None:
            self._machine.close()
        if self._guest is not None:
            self._guest.close()
        if self._link is not None:
            self._link.close(detach_sandbox=True, keep_sessions=bool(self._record.fields.get("saved")))
            # So that the keeper need not detach it once more.
            self._update(control_socket="")
        if self._thread.is_alive():
            self._reactor.stop()
            self._thread.join()
        if self._bridge is not None:
            self._bridge.close()
        if self._launch.detached:
            self._record.fields.setdefault("exit_status", 128 + signal.SIGKILL)
            self._update(state="exited", **({"error": str(self._why)} if self._why is not None else {}))
        elif self._why is not None:
            leash.send(self._leash, {"event": "gone", **leash.describe(self._why)})
        for sock in (*self._clients, *([self._listener] if self._listener else [])):
            sock.close()

    def _report_failure(self, error: BaseException) -> None:
        if not isinstance(error, (RemoraError, OSError)):
            sys.excepthook(type(error), error, error.__traceback__)
        self._why = error if isinstance(error, RemoraError) else leash.restore(leash.describe(error))
        self._record.fields["exit_status"] = self._record.fields.get("exit_status", self._why.exit_status)
        leash.send(self._leash, {"event": "failed", **leash.describe(self._why)})

    def _update(self, **fields: Any) -> None:
        self._record.fields.update(fields)
        write_state(self._record)

    # -- requests, run by the main thread ---------------------------------------------------------------------------

    def _stop_main(self, time_s: float, signum: int) -> None:
        """End the container's process: politely, then not; then end the sandbox."""
        self._update(state="stopping")
        assert self._guest is not None
        try:
            self._guest.signal(MAIN, signum)
            try:
                self._guest.wait(MAIN, time_s)
            except RemoraError as error:
                if isinstance(error, UnavailableError):
                    raise
                self._guest.signal(MAIN, signal.SIGKILL)
        except RemoraError:
            # The guest does not answer or has no such process: its machine is ended below.
            self._abort(None)
            return
        # Whoever follows the process (the maker, or the log keeper here) now gets its status and ends the sandbox.
        timer = threading.Timer(FAREWELL_S, lambda: self._abort(None))
        timer.daemon = True
        timer.start()

    def _save(self, path: str) -> None:
        """Write the machine's state, let the agent keep its sessions, and end."""
        assert self._machine is not None
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        try:
            self._machine.save(Path(path), MONITOR_TIMEOUT_S)
        except (OSError, RemoraError) as error:
            self._report_failure(error)
            self._ending.set()
            return
        self._update(saved=True)
        leash.send(self._leash, {"event": "saved"})
        self._ending.set()

    # -- the machine ------------------------------------------------------------------------------------------------

    def _start_machine(self) -> None:
        monitor, launch = driver(self._launch.vmm, self._launch.jail), self._launch
        channel: socket.socket | None = None
        if monitor.capabilities.channel == "vsock":
            machine = monitor.start(launch.vm, directory=launch.directory, keep_fds=launch.keep_fds)
        else:
            channel, guest_end = socket.socketpair()
            with guest_end:
                try:
                    machine = monitor.start(
                        launch.vm,
                        directory=launch.directory,
                        channel_fd=guest_end.fileno(),
                        keep_fds=launch.keep_fds,
                    )
                except BaseException:
                    channel.close()
                    raise
        self._machine = machine
        self._record.fields.update(machine_pid=machine.pid, machine_started=process_start(machine.pid))
        self._update(monitor_pid=os.getpid())
        self._in_reactor(lambda: self._watch_machine(machine, channel))

    def _watch_machine(self, machine: Machine, channel: socket.socket | None) -> None:
        self._reactor.watch_pid(machine.pid, lambda: self._machine_ended(machine))
        self._reactor.register(machine.console.fileno(), READ, lambda _events: self._read_console(machine))

        def ended(error: RemoraError) -> None:
            self._channel_ended(machine, error)

        if channel is not None:
            self._bridge = Bridge(self._reactor, channel, self._launch.directory, on_end=ended)

    def _read_console(self, machine: Machine) -> None:
        if not machine.read_console():
            self._reactor.unregister(machine.console.fileno())

    def _replace_machine(self) -> None:
        old, bridge = self._machine, self._bridge
        assert old is not None
        self._machine = self._bridge = None

        def drop() -> None:
            if bridge is not None:
                bridge.close()
            self._reactor.unregister(old.console.fileno())
            old.close()

        self._in_reactor(drop)
        self._start_machine()

    def _in_reactor(self, call: Callable[[], None]) -> None:
        """Have the reactor's thread make a call and wait for it; before that thread runs, make it here."""
        if not self._thread.is_alive():
            call()
            return
        done = threading.Event()

        def wrapped() -> None:
            try:
                call()
            finally:
                done.set()

        self._reactor.post(wrapped)
        done.wait()

    # -- the reactor's thread ---------------------------------------------------------------------------------------

    def _abort(self, why: RemoraError | None) -> None:
        """End the sandbox from any thread: the main thread's blocking calls fail and it goes on to `_end`."""
        if self._why is None and not self._ending.is_set():
            self._why = why
        self._ending.set()
        if self._machine is not None:
            self._machine.kill()
        self._reactor.post(self._close_bridge)
        self._reason_known.set()
        self._requests.put(lambda: None)

    def _close_bridge(self) -> None:
        if self._bridge is not None:
            self._bridge.close()

    def _machine_ended(self, machine: Machine) -> None:
        ended = machine.reap()
        if machine is not self._machine or ended is None:
            return
        self._abort(why_ended(ended, self._launch.vm.ram_file, monitor=self._launch.vmm))

    def _channel_ended(self, machine: Machine, error: RemoraError) -> None:
        def give_up() -> None:
            if machine is self._machine:
                self._abort(error)

        if isinstance(error, UnavailableError):
            # QEMU is going: its end says more than this.
            self._reactor.call_later(2 * EXPLAIN_S, give_up)
        else:
            give_up()

    def _listen(self) -> None:
        self._reactor.register(self._leash.fileno(), READ, lambda _events: self._on_leash())
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener = listener
        listener.bind(str(self._launch.directory / MONITOR_SOCKET))
        listener.listen(16)
        self._reactor.register(listener.fileno(), READ, lambda _events: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        self._clients.add(client)
        self._reactor.register(client.fileno(), READ, lambda _events: self._on_client(client))

    def _on_client(self, client: socket.socket) -> None:
        message = leash.receive(client, None)
        if message is None:
            self._reactor.unregister(client.fileno())
            self._clients.discard(client)
            client.close()
        else:
            self._on_message(message)

    def _on_leash(self) -> None:
        message = leash.receive(self._leash, None)
        if message is not None:
            self._on_message(message)
            return
        self._reactor.unregister(self._leash.fileno())
        if not self._released:
            self._abort(None)

    def _on_message(self, message: dict[str, Any]) -> None:
        match message.get("do"):
            case "release":
                self._released = True
            case "stop":
                time_s, signum = float(message.get("time_s", 10)), int(message.get("signal", signal.SIGTERM))
                self._requests.put(lambda: self._stop_main(time_s, signum))
            case "kill":
                self._abort(None)
            case "save":
                path = str(message["path"])
                self._requests.put(lambda: self._save(path))
            case other:
                print(f"monitor: unknown request {other!r}", file=sys.stderr)
