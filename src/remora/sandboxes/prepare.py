"""Turns what was asked for into what a monitor can start: images into disks, options into a virtual machine.

Everything that may take long or fail for a reason that the caller can mend happens here, in the caller's process,
before anything of the sandbox exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from remora.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from remora.guest.kernel import OS_DISK_SERIAL, kernel_arguments
from remora.images.flatten import flatten
from remora.images.store import ImageStore
from remora.sandboxes import jailing
from remora.sandboxes.guest_files import Progress, guest_files
from remora.sandboxes.launch import MountSpec, ProcessSpec
from remora.sandboxes.options import DEFAULT_PATH, Options, guest_mount
from remora.vmm.contract import Disk, VmSpec
from remora.vmm.drivers import driver
from remora.vmm.probe import accelerator
from remora.vmm.tsc import host_tsc_khz


class Prepared(NamedTuple):
    """A virtual machine and the container in it."""

    vm: VmSpec
    layers: tuple[str, ...]
    mounts: tuple[MountSpec, ...]
    process: ProcessSpec
    image: str
    #: Open descriptors that the disks need; the holder of the context closes them.
    keep_fds: tuple[int, ...]


@contextlib.contextmanager
def prepared(
    options: Options, *, state_dir: Path, template: bool = False, progress: Progress | None = None
) -> Iterator[Prepared]:
    """Prepare a cold boot; inside the context the image cannot be removed and the descriptors are open.

    Raises:
        NotFoundError: there is no such image.
        FailedPreconditionError: something is not installed; the message names it.
        InvalidArgumentError: an option cannot be fulfilled.
    """
    if options.jail is not None:
        jailing.check(options.vmm)
    monitor = driver(options.vmm)
    store = ImageStore(state_dir / "images")
    mounted = sum(mount.type in ("image", "bind") for mount in options.mounts)
    image = flatten(store, store.get(options.image), max(1, monitor.capabilities.max_disks - mounted - 1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.hold(image))
        files = guest_files(state_dir, progress)
        accel = accelerator(files.kernel, state_dir / "host")
        tsc_khz = host_tsc_khz(state_dir / "host") if accel == "tcg" else None
        disks = [Disk(OS_DISK_SERIAL, files.disk)]
        layers = []
        keep_fds: list[int] = []
        for number, layer in enumerate(image.layers):
            layers.append(f"l{number:02}")
            disks.append(Disk(layers[-1], layer))
            # The sandbox's own hold on the layer, for as long as one of its processes lives (images/store.py).
            fd = os.open(layer, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
            keep_fds.append(fd)
        mounts: list[MountSpec] = []
        for number, mount in enumerate(options.mounts):
            serial = f"m{number:02}"
            if mount.type == "image":
                disks.append(Disk(serial, mount.source or Path()))
            elif mount.type == "bind":
                fd = _pack(mount.source or Path(), state_dir)
                stack.callback(os.close, fd)
                keep_fds.append(fd)
                disks.append(Disk(serial, Path(f"/proc/self/fd/{fd}")))
            mounts.append(guest_mount(mount, serial))
        vm = VmSpec(
            kernel=files.kernel,
            initrd=files.initrd,
            arguments=kernel_arguments(
                tsc_khz,
                template=template,
                vsock=monitor.capabilities.channel == "vsock",
                # Firecracker tells the guest no serials of ours, so the order of the disks does.
                disks=[disk.serial for disk in disks] if monitor.capabilities.channel == "vsock" else [],
            ),
            memory_mib=options.memory_mib,
            cpus=options.cpus,
            accelerator=accel,
            disks=tuple(disks),
        )
        monitor.check(vm)
        config = image.config
        entrypoint = config.entrypoint if options.entrypoint is None else options.entrypoint
        # As with docker: a command replaces the image's, and a new entry point drops the image's command as well.
        command = options.command or (config.cmd if options.entrypoint is None else ())
        args = (*entrypoint, *command)
        if not args:
            raise InvalidArgumentError(
                f"the image {image.name} does not say what to run", fix=f"name a command: remora run {image.name} sh"
            )
        env = {"PATH": DEFAULT_PATH, **config.env, **dict(options.env)}
        if options.terminal is not None:
            env.setdefault("TERM", os.environ.get("TERM", "xterm"))
        rows, columns = options.terminal or (0, 0)
        process = ProcessSpec(
            args=args,
            env=tuple(f"{key}={value}" for key, value in env.items()),
            cwd=options.cwd or config.cwd or "/",
            user=options.user or config.user,
            terminal=options.terminal is not None,
            rows=rows,
            columns=columns,
            stdin=options.stdin,
        )
        yield Prepared(vm, tuple(layers), tuple(mounts), process, image.name, tuple(keep_fds))


def _pack(directory: Path, state_dir: Path) -> int:
    """Return a descriptor of an erofs image of `directory` that has no name, so that nothing can leave it behind."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=state_dir) as file:
        target = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        try:
            done = subprocess.run(
                ["mkfs.erofs", "--quiet", target, str(directory)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise FailedPreconditionError(
                "mkfs.erofs is not installed, and a bind mount is packed with it",
                fix="install it: apt-get install erofs-utils",
            ) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            if "No space left" in done.stderr:
                raise ResourceExhaustedError(
                    f"no space to pack {directory} in {state_dir}", fix="free some space there"
                )
            raise FailedPreconditionError(f"{directory} could not be packed: {lines[-1]}")
        return os.dup(file.fileno())
