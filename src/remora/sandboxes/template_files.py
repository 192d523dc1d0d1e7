"""How a virtual machine is written down in a template's directory, and which monitor may read it again."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from remora.vmm.contract import Disk, VmSpec
from remora.vmm.drivers import driver


def vmm_version(name: str, state_dir: Path) -> str:
    """Return the version of an installed monitor; asked again when its file changes (asking QEMU costs 40 ms)."""
    monitor = driver(name)
    info = os.stat(monitor.binary)
    stamp = f"{info.st_mtime_ns}-{info.st_size}-{info.st_ino}"
    note = state_dir / "host" / f"{name}-version.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(note.read_text())
        if kept["stamp"] == stamp:
            return str(kept["version"])
    version = monitor.version
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = note.with_name(f".{note.name}.{os.getpid()}")
    draft.write_text(json.dumps({"stamp": stamp, "version": version}))
    draft.replace(note)
    return version


def with_own_files(vm: VmSpec, directory: Path) -> VmSpec:
    """Give the template its own links to every file that the machine reads."""

    def own(path: Path, name: str) -> Path:
        target = directory / name
        try:
            if str(path).startswith("/proc/"):
                raise OSError("a file without a name cannot be linked")
            os.link(path, target)
        except OSError:
            # Another file system, or a packed directory that has no name.
            import shutil

            shutil.copyfile(path, target)
        return target

    return vm._replace(
        kernel=own(vm.kernel, "kernel"),
        initrd=own(vm.initrd, "initrd"),
        disks=tuple(disk._replace(path=own(disk.path, f"d{n:02}")) for n, disk in enumerate(vm.disks)),
    )


def vm_to_json(vm: VmSpec) -> dict[str, Any]:
    """Return `vm` with the names of its files in the template's directory."""
    assert vm.ram_file is not None
    assert not vm.networks
    assert not vm.slots
    return {
        **vm._asdict(),
        "kernel": vm.kernel.name,
        "initrd": vm.initrd.name,
        "ram_file": vm.ram_file.name,
        "disks": [[disk.serial, disk.path.name] for disk in vm.disks],
    }


def vm_from_json(values: dict[str, Any], directory: Path) -> VmSpec:
    vm = VmSpec(
        **{
            **values,
            "kernel": directory / values["kernel"],
            "initrd": directory / values["initrd"],
            "ram_file": directory / values["ram_file"],
            "networks": (),
            "slots": (),
            "disks": tuple(Disk(serial, directory / name) for serial, name in values["disks"]),
        }
    )
    for path in (vm.kernel, vm.initrd, vm.ram_file, *(disk.path for disk in vm.disks)):
        if path is None or not path.is_file():
            raise FileNotFoundError(f"the file {path} is missing")
    return vm
