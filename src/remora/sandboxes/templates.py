"""Templates: a function booted once, stopped at the moment it says `remora.ready()`, and started from there many times.

    <state>/templates/<name>/spec.json   the virtual machine, and what it was made of
                             ram         the guest's memory; clones map it copy-on-write, so it never changes
                             state       CPU and devices, as QEMU saved them (50 KB)
                             kernel, initrd, d00, d01, ...   hard links: a template needs no image any more
                             lock        shared flock(2): a clone lives; exclusive: being removed

A template appears under its name whole or not at all. QEMU restores a state only into the version that saved it, and an
emulated guest keeps right time only on a host with the same TSC rate, so both are noted and compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from remora import paths
from remora.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.sandboxes.launch import Launch
from remora.sandboxes.options import Options, attachment
from remora.sandboxes.registry import Record, check_name, remove_flat
from remora.sandboxes.template_files import vm_from_json, vm_to_json, vmm_version, with_own_files
from remora.vmm.contract import VmSpec
from remora.vmm.drivers import TITLES
from remora.vmm.tsc import host_tsc_khz

if TYPE_CHECKING:
    from remora.sandboxes.spawner import Launcher

SPEC_FILE = "spec.json"
FORMAT = 2
READY_TIMEOUT_S = 120.0
SAVE_TIMEOUT_S = 60.0
#: Rates within 100 ppm are one rate: the measurement is good to 10 ppm.
_TSC_TOLERANCE = 1e-4
_ABANDONED_S = 60.0


class Stored(NamedTuple):
    """A template, ready to be cloned; `lock_fd` keeps it from being removed."""

    name: str
    #: Sandbox id under which it was made: the parent of its clones' sessions.
    sandbox: str
    vm: VmSpec
    #: Name of the driver that saved it, and alone can restore it.
    vmm: str
    state_file: Path
    accelerator: bool
    #: For the records of clones.
    fields: dict[str, Any]
    lock_fd: int


class Listed(NamedTuple):
    """A line of `remora template list`."""

    name: str
    image: str
    memory_mib: int
    created_s: float
    size_bytes: int


class Templates:
    """The templates below one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.root = state_dir / "templates"

    def list(self) -> list[Listed]:
        found = []
        if self.root.is_dir():
            for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    if not entry.name.startswith("."):
                        found.append(self._listed(entry.name))
        return found

    def _listed(self, name: str) -> Listed:
        directory = self.root / name
        spec = json.loads((directory / SPEC_FILE).read_text())
        # Blocks and not lengths: the memory file is sparse.
        size = sum((directory / file).stat().st_blocks * 512 for file in ("ram", "state"))
        return Listed(name, spec["fields"]["image"], spec["vm"]["memory_mib"], spec["created_s"], size)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Stored]:
        """Open a template for cloning.

        Raises:
            NotFoundError: there is none of that name.
            FailedPreconditionError: this host cannot restore it.
        """
        directory = self.root / name
        try:
            lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(listed.name for listed in self.list()) or "none yet"
            raise NotFoundError(
                f"no template is called '{name}'; there are: {known}", fix="make one: remora template create NAME IMAGE"
            ) from None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield self._read(name, lock_fd)
        except BlockingIOError as error:
            raise NotFoundError(f"the template {name} is being removed", fix="make it again") from error
        finally:
            os.close(lock_fd)

    def _read(self, name: str, lock_fd: int) -> Stored:
        directory = self.root / name
        try:
            spec = json.loads((directory / SPEC_FILE).read_text())
            if spec["format"] != FORMAT:
                raise FailedPreconditionError(
                    f"the template {name} was made by another version of Remora", fix=_remake(name, spec)
                )
            vm = vm_from_json(spec["vm"], directory)
            stored = Stored(
                name,
                spec["sandbox"],
                vm,
                spec["vmm"],
                directory / "state",
                spec["accelerator"],
                spec["fields"],
                lock_fd,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataLossError(
                f"the template {name} is damaged: {error}",
                fix=f"remove it and make it again: remora template remove {name}",
            ) from error
        version = vmm_version(stored.vmm, self._state_dir)
        if spec["vmm_version"] != version:
            raise FailedPreconditionError(
                f"the template {name} was saved by {TITLES[stored.vmm]} {spec['vmm_version']} and this host has "
                f"{version}",
                fix=_remake(name, spec),
            )
        if spec["tsc_khz"]:
            here = host_tsc_khz(self._state_dir / "host")
            if abs(here - spec["tsc_khz"]) > here * _TSC_TOLERANCE:
                raise FailedPreconditionError(
                    f"the template {name} was made on a host with a {spec['tsc_khz']} kHz TSC and this one has {here} "
                    "kHz: its clock would run wrong",
                    fix=_remake(name, spec),
                )
        return stored

    def create(
        self,
        name: str,
        options: Options,
        *,
        ready_timeout_s: float = READY_TIMEOUT_S,
        launcher: Launcher | None = None,
        on_output: Callable[[bytes], None] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Listed:
        """Boot the image, wait until its function is ready, and save it under `name`.

        Args:
            on_output: gets what the function writes until it is ready.

        Raises:
            AlreadyExistsError: the name is taken.
            FailedPreconditionError: the function ended, or was not ready in time; the message has its last output.
            ResourceExhaustedError: the disk is full.
        """
        from remora.sandboxes.prepare import prepared
        from remora.sandboxes.readiness import until_ready
        from remora.sandboxes.sandbox import Sandbox

        check_name(name)
        refuse_jail(options)
        self._check_free(name)
        self._check_space(options.memory_mib)
        began_s = time.monotonic()
        with (
            self._draft() as draft,
            prepared(options, state_dir=self._state_dir, template=True, progress=progress) as ready,
        ):
            try:
                vm = with_own_files(ready.vm, draft)._replace(ram_file=draft / "ram")
            except OSError as error:
                raise ResourceExhaustedError(
                    f"the template does not fit: {error.strerror}", fix=f"free some space in {self.root}"
                ) from error
            sandbox_id = ""

            def make(record: Record) -> Launch:
                nonlocal sandbox_id
                sandbox_id = record.id
                return Launch(
                    id=record.id,
                    directory=record.directory,
                    hostname=options.hostname or name,
                    vm=vm,
                    vmm=options.vmm,
                    layers=ready.layers,
                    mounts=ready.mounts,
                    readonly_root=options.readonly_root,
                    process=ready.process,
                    attach=attachment(options, template=True),
                    boot_timeout_s=options.boot_timeout_s,
                    began_s=began_s,
                    keep_fds=ready.keep_fds,
                )

            fields = {
                "image": ready.image,
                "command": list(ready.process.args),
                "kvm": vm.accelerator == "kvm",
                "env": list(ready.process.env),
                "cwd": ready.process.cwd,
                "user": ready.process.user,
                "terminal": False,
                "cpus": options.cpus,
                "memory_mib": options.memory_mib,
            }
            with Sandbox.start(options, make, {**fields, "template_of": name}, launcher=launcher) as sandbox:
                until_ready(sandbox, ready_timeout_s, on_output)
                sandbox.guest.sync()
                sandbox.save(draft / "state", SAVE_TIMEOUT_S)
            spec = {
                "format": FORMAT,
                "sandbox": sandbox_id,
                "vm": vm_to_json(vm._replace(ram_private=True, incoming=True)),
                "vmm": options.vmm,
                "vmm_version": vmm_version(options.vmm, self._state_dir),
                "tsc_khz": host_tsc_khz(self._state_dir / "host") if vm.accelerator == "tcg" else 0,
                "accelerator": options.accelerator,
                "created_s": time.time(),
                "fields": fields,
            }
            (draft / SPEC_FILE).write_text(json.dumps(spec, indent=1))
            self._check_free(name)
            try:
                draft.rename(self.root / name)
            except OSError as error:
                raise _taken(name) from error
        return self._listed(name)

    def remove(self, name: str) -> None:
        """Remove a template, and the sessions that the agent keeps for its clones.

        Raises:
            NotFoundError: there is none of that name.
            FailedPreconditionError: clones of it run.
        """
        directory = self.root / name
        if name.startswith(".") or not directory.is_dir():
            raise NotFoundError(f"no template is called '{name}'", fix="`remora template list` shows them")
        sandbox = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            sandbox = json.loads((directory / SPEC_FILE).read_text())["sandbox"]
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = self.root / f".gone-{os.urandom(6).hex()}"
                directory.rename(gone)
            except BlockingIOError as error:
                raise FailedPreconditionError(
                    f"clones of the template {name} still run", fix="stop them first: `remora ps` shows them"
                ) from error
            finally:
                os.close(fd)
            remove_flat(gone)
        remove_flat(directory)
        if sandbox and paths.control_socket().exists():
            from remora.sandboxes.agent_link import detach

            # No agent, no sessions.
            with contextlib.suppress(RemoraError):
                detach(paths.control_socket(), sandbox)

    def sweep(self) -> None:
        """Remove what a killed `create` or `remove` has left."""
        if not self.root.is_dir():
            return
        for entry in list(os.scandir(self.root)):
            if not entry.name.startswith("."):
                continue
            try:
                fd = os.open(Path(entry.path) / "lock", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                # Not locked yet, or half removed: only what is old is nobody's.
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _ABANDONED_S:
                        remove_flat(Path(entry.path))
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_flat(Path(entry.path))
            except BlockingIOError:
                continue  # somebody is at work in it
            finally:
                os.close(fd)

    def _check_space(self, memory_mib: int) -> None:
        """Refuse early: a full disk under a memory file would end QEMU with SIGBUS and no word about the disk."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        space = os.statvfs(self.root)
        free_mib = space.f_bavail * space.f_frsize >> 20
        if free_mib < memory_mib:
            raise ResourceExhaustedError(
                f"a template of {memory_mib} MiB of memory needs as much disk, and {self.root} has {free_mib} MiB left",
                fix="free some space there, or give the function less memory: --memory",
            )

    def _check_free(self, name: str) -> None:
        if (self.root / name).exists():
            raise _taken(name)

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        """Make a directory that is removed again unless it was renamed."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.root / f".new-{os.urandom(6).hex()}"
        draft.mkdir(mode=0o700)
        fd = os.open(draft / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield draft
        finally:
            remove_flat(draft)
            os.close(fd)


def refuse_jail(options: Options) -> None:
    """Refuse a jail for a template and its clones.

    A saved machine names its files by their paths in the jail, and each clone would have to be jailed alike and read
    its template's memory, which has everything that the function holds, as another user. Firecracker's driver can do
    it, but with no KVM at hand no guest has been restored in a jail, and such a thing is not offered untried.
    """
    if options.jail is not None:
        raise FailedPreconditionError(
            "neither a template nor a clone of one runs in a jail",
            fix="leave --jail out, or boot the image instead: remora run --jail",
        )


def _taken(name: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"a template is called '{name}' already", fix=f"remove it first: remora template remove {name}"
    )


def _remake(name: str, spec: dict[str, Any]) -> str:
    image = spec.get("fields", {}).get("image", "IMAGE")
    return f"make it again: remora template remove {name} && remora template create {name} {image}"
