"""Slots of a real QEMU: media change while the machine runs, and a wrong one is refused without harm."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from remora import paths
from remora.errors import FailedPreconditionError
from remora.sandboxes.guest_files import guest_files
from remora.vmm.contract import Slot, VmSpec
from remora.vmm.qemu import QemuDriver

pytestmark = pytest.mark.vm


def test_a_slot_takes_one_medium_after_another(tmp_path: Path) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is missing: run scripts/system-packages.sh")
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(4096))
    os_files = guest_files(paths.state_dir())
    spec = VmSpec(
        kernel=os_files.kernel,
        initrd=os_files.initrd,
        arguments="",
        memory_mib=128,
        cpus=1,
        accelerator="tcg",
        slots=(Slot("r00"), Slot("r01")),
        # Nothing boots: it is the monitor's commands that are tried.
        incoming=True,
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        machine = QemuDriver().start(spec, directory=tmp_path, channel_fd=theirs.fileno())
        try:
            machine.connect(20)
            for name in ("one", "two", "one"):
                machine.insert("r00", tmp_path / name)
                machine.insert("r01", tmp_path / name)
                machine.eject("r00")
            with pytest.raises(FailedPreconditionError, match="missing"):
                machine.insert("r00", tmp_path / "missing")
            machine.insert("r00", tmp_path / "two")
        finally:
            machine.close()
