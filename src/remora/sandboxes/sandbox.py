"""A microVM with its image, its guest and its way to the accelerator, as one object.

    with Sandbox.boot(Options(image="tools", command=("sh", "-c", "echo hello"))) as sandbox:
        print(sandbox.process.communicate().stdout)

    with Sandbox.clone("classify") as sandbox: ...

The object is the maker's view. The sandbox itself lives in its monitor's process; when this object is closed, or this
program dies, the monitor takes it down. `Sandbox.open` looks at a sandbox that another command made.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora import paths
from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    RemoraError,
    UnavailableError,
)
from remora.sandboxes import clearing, leash
from remora.sandboxes.guest import MAIN, Guest, process
from remora.sandboxes.jailing import jail_of
from remora.sandboxes.launch import Launch, ProcessSpec
from remora.sandboxes.options import DEFAULT_PATH, Options, attachment
from remora.sandboxes.processes import GuestProcess
from remora.sandboxes.registry import MONITOR_SOCKET, Record, Registry
from remora.sandboxes.spawner import Launcher, shared
from remora.sandboxes.starting import start
from remora.wire import guest_v1

EXPLAIN_S = 3.0


class Sandbox:
    """See the module. Not thread-safe, except that one thread may wait for a process while others use the rest."""

    def __init__(self, record: Record, leash_sock: socket.socket | None) -> None:
        self._record = record
        self._leash = leash_sock
        self._guest: Guest | None = None
        self._process: GuestProcess | None = None
        #: Milliseconds from the call of `boot` or `clone` to each stage, by name.
        self.timings: dict[str, float] = {}
        #: Why there is no accelerator yet, if one was asked for.
        self.warning = ""

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def boot(
        cls,
        options: Options,
        *,
        state_dir: Path | None = None,
        launcher: Launcher | None = None,
        progress: Callable[[str, float], None] | None = None,
        on_slow: Callable[[], None] | None = None,
    ) -> Sandbox:
        """Boot a microVM and start the image's process in it.

        Raises:
            NotFoundError: there is no such image.
            FailedPreconditionError, InvalidArgumentError, AlreadyExistsError: with what to do about it.
            UnavailableError: it did not come up.
        """
        began_s = time.monotonic()
        # Not for clones: what reads images costs them 20 ms of import.
        from remora.sandboxes.prepare import prepared

        with prepared(options, state_dir=state_dir or paths.state_dir(), progress=progress) as ready:

            def make(record: Record) -> Launch:
                return Launch(
                    id=record.id,
                    directory=record.directory,
                    hostname=options.hostname or options.name or record.id,
                    vm=ready.vm,
                    vmm=options.vmm,
                    jail=jail_of(record.fields),
                    layers=ready.layers,
                    mounts=ready.mounts,
                    readonly_root=options.readonly_root,
                    process=ready.process,
                    attach=attachment(options),
                    detached=options.detached,
                    boot_timeout_s=options.boot_timeout_s,
                    began_s=began_s,
                    keep_fds=ready.keep_fds,
                )

            fields = {
                "image": ready.image,
                "command": list(ready.process.args),
                "kvm": ready.vm.accelerator == "kvm",
                "env": list(ready.process.env),
                "cwd": ready.process.cwd,
                "user": ready.process.user,
                "terminal": ready.process.terminal,
            }
            return cls.start(options, make, fields, launcher=launcher, on_slow=on_slow)

    @classmethod
    def clone(
        cls,
        template: str,
        options: Options | None = None,
        *,
        state_dir: Path | None = None,
        launcher: Launcher | None = None,
        on_slow: Callable[[], None] | None = None,
    ) -> Sandbox:
        """Start a microVM from a template: its function runs already and is let go now, under a new identity.

        Of `options` only name, hostname, labels, tenant, accelerator and detached count; the rest is the template's.

        Raises:
            NotFoundError: there is no such template.
            FailedPreconditionError: it was made by another version of QEMU.
        """
        began_s = time.monotonic()
        from remora.sandboxes.templates import Templates, refuse_jail

        options = options or Options()
        refuse_jail(options)
        with Templates(state_dir or paths.state_dir()).use(template) as stored:

            def make(record: Record) -> Launch:
                return Launch(
                    id=record.id,
                    directory=record.directory,
                    hostname=options.hostname or options.name or record.id,
                    vm=stored.vm,
                    vmm=stored.vmm,
                    state_file=stored.state_file,
                    attach=attachment(options, parent=stored.sandbox) if stored.accelerator else None,
                    detached=options.detached,
                    boot_timeout_s=options.boot_timeout_s,
                    began_s=began_s,
                    keep_fds=(stored.lock_fd,),
                )

            fields = {**stored.fields, "template": template}
            return cls.start(options, make, fields, launcher=launcher, on_slow=on_slow)

    @classmethod
    def start(
        cls,
        options: Options,
        make: Callable[[Record], Launch],
        fields: dict[str, Any],
        *,
        launcher: Launcher | None = None,
        on_slow: Callable[[], None] | None = None,
    ) -> Sandbox:
        """Start the sandbox that `make` describes once its directory exists (see starting.py)."""
        started = start(options, make, fields, launcher=launcher or shared(), on_slow=on_slow)
        sandbox = cls(started.record, started.leash)
        sandbox.timings = started.timings
        sandbox.warning = started.warning
        return sandbox

    @classmethod
    def open(cls, name: str) -> Sandbox:
        """Look at a running sandbox by its name or id; closing the view leaves it alone.

        Raises:
            NotFoundError: there is none of that name.
            FailedPreconditionError: it does not run.
        """
        registry = Registry(paths.runtime_dir())
        record = registry.find(name)
        if record.state not in ("running", "stopping"):
            raise FailedPreconditionError(
                f"the microVM {record.name or record.id} does not run: it is {record.state}",
                fix="`remora ps` lists those that do",
            )
        return cls(record, None)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def name(self) -> str:
        return self._record.name or self._record.id

    @property
    def directory(self) -> Path:
        return self._record.directory

    @property
    def fields(self) -> dict[str, Any]:
        """The record as it was when this object was made."""
        return self._record.fields

    @property
    def guest(self) -> Guest:
        """The control connection, opened on first use."""
        if self._guest is None:
            try:
                self._guest = Guest(self._record.channel)
            except UnavailableError as error:
                raise self._explain(error) from error
        return self._guest

    @property
    def process(self) -> GuestProcess:
        """The container's own process; its streams are attached on first use."""
        if self._process is None:
            terminal = bool(self._record.fields.get("terminal"))
            self._process = GuestProcess(
                self.guest, self._record.channel, MAIN, terminal=terminal, explain=self._explain
            )
        return self._process

    # -- using it ---------------------------------------------------------------------------------------------------

    def exec(
        self,
        command: tuple[str, ...],
        *,
        env: tuple[tuple[str, str], ...] = (),
        cwd: str = "",
        user: str = "",
        terminal: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> GuestProcess:
        """Start another process in the container.

        Raises:
            NotFoundError: there is no such program in the container.
        """
        fields = self._record.fields
        inherited = dict(pair.partition("=")[::2] for pair in fields.get("env", []))
        variables = {"PATH": DEFAULT_PATH, **inherited, **dict(env)}
        rows, columns = terminal or (0, 0)
        spec = ProcessSpec(
            args=command,
            env=tuple(f"{key}={value}" for key, value in variables.items()),
            cwd=cwd or str(fields.get("cwd") or "/"),
            user=user or str(fields.get("user") or ""),
            terminal=terminal is not None,
            rows=rows,
            columns=columns,
            stdin=stdin,
        )
        process_id = f"x{os.urandom(6).hex()}"
        try:
            self.guest.start(process_id, process(spec))
        except NotFoundError as error:
            error.exit_status = 127
            raise
        return GuestProcess(
            self.guest,
            self._record.channel,
            process_id,
            terminal=terminal is not None,
            stdin=stdin,
            explain=self._explain,
        )

    def stats(self) -> guest_v1.StatsResponse:
        return self.guest.stats()

    def devices(self) -> guest_v1.DevicesResponse:
        """Return what hardware the guest sees."""
        return self.guest.devices()

    def request_stop(self, *, time_s: float = 10.0, signum: int = 15) -> None:
        """Ask the monitor to end the container's process: with `signum`, and after `time_s` by force."""
        self._ask({"do": "stop", "time_s": time_s, "signal": signum})

    def kill(self) -> None:
        """Ask the monitor to end the sandbox at once."""
        self._ask({"do": "kill"})

    def wait_until_gone(self, timeout_s: float) -> bool:
        """Wait until no process of the sandbox is left; False if one still is after `timeout_s`."""
        registry = Registry(paths.runtime_dir())
        deadline_s = time.monotonic() + timeout_s
        while registry.is_alive(self._record):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.01)
        return True

    def _ask(self, message: dict[str, Any]) -> None:
        if self._leash is not None:
            leash.send(self._leash, message)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                sock.connect(str(self.directory / MONITOR_SOCKET))
            except OSError as error:
                raise UnavailableError(f"the monitor of {self.name} does not answer: {error.strerror}") from error
            leash.send(sock, message)

    def save(self, path: Path, timeout_s: float) -> None:
        """Write the machine's state and end it (templates); memory stays in the machine's RAM file."""
        assert self._leash is not None
        self._let_go_of_guest()
        leash.send(self._leash, {"do": "save", "path": str(path)})
        message = leash.receive(self._leash, timeout_s)
        if message is None:
            raise UnavailableError("the microVM ended before its state was saved")
        if message["event"] != "saved":
            raise leash.restore(message)

    def release(self) -> None:
        """Let a detached sandbox go on without this program."""
        if self._leash is not None:
            leash.send(self._leash, {"do": "release"})
            self._leash.close()
            self._leash = None
        self._let_go_of_guest()

    # -- its end ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the sandbox down, if it is ours, and wait until nothing of it is left."""
        self._let_go_of_guest()
        if self._leash is None:
            return
        sock, self._leash = self._leash, None
        leash.hang_up(sock, self.id)

    def _let_go_of_guest(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    def _explain(self, error: RemoraError) -> RemoraError:
        """Return why the guest is gone, if the monitor or its keeper knows; else `error`."""
        if self._leash is None:
            return error
        try:
            while message := leash.receive(self._leash, EXPLAIN_S):
                if message["event"] in ("gone", "failed"):
                    return leash.restore(message)
        except DeadlineExceededError:
            pass  # nobody knows more
        return error


def sweep() -> int:
    """Clear what killed sandboxes have left on this host; every command does this first."""
    return clearing.sweep(Registry(paths.runtime_dir()))


def find(name: str) -> Record:
    return Registry(paths.runtime_dir()).find(name)
