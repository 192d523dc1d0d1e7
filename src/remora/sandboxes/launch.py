"""What a sandbox's monitor must know, as one value.

It crosses a process border (fork, or a message to the spawner), so it holds plain values only. NamedTuples for the
reason that vmm/contract.py gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from remora.vmm.contract import VmSpec
from remora.vmm.jail import Jail


class MountSpec(NamedTuple):
    """A file system in the container beyond its root: `type` is `disk` (source: a disk's serial) or `tmpfs`."""

    type: str
    source: str
    destination: str
    readonly: bool


class ProcessSpec(NamedTuple):
    """The container's process."""

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = ""
    terminal: bool = False
    rows: int = 0
    columns: int = 0
    stdin: bool = False


class AttachSpec(NamedTuple):
    """How the sandbox is known to the node agent."""

    control_socket: Path
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    #: Sandbox id of the template that this one is a clone of.
    parent: str = ""
    template: bool = False
    #: Ids of the grants that its containers carry (shim/identity.py).
    grants: tuple[str, ...] = ()


class Launch(NamedTuple):
    """One sandbox, ready to be started."""

    id: str
    directory: Path
    hostname: str
    vm: VmSpec
    #: Name of the driver that runs it (vmm/drivers.py).
    vmm: str = "qemu"
    #: Where the monitor is locked in, and the guest's channel is; None: neither, the channel is in `directory`.
    jail: Jail | None = None
    #: Serials of the disks with the image's layers, lowest first. Not used for clones.
    layers: tuple[str, ...] = ()
    mounts: tuple[MountSpec, ...] = ()
    readonly_root: bool = False
    #: None for clones: their process runs already.
    process: ProcessSpec | None = None
    #: Saved state to start from (clones).
    state_file: Path | None = None
    #: None: no accelerator.
    attach: AttachSpec | None = None
    #: True: goes on without its maker, keeps its output in files.
    detached: bool = False
    #: Until the guest must answer; the second try gets twice as much.
    boot_timeout_s: float = 60.0
    #: time.monotonic() at which the caller began: stamps count from here.
    began_s: float = 0.0
    #: Inherited descriptors, kept open under their numbers: disks that have no path, locks of templates.
    keep_fds: tuple[int, ...] = ()
