"""One guest OS image per session, one microVM per module."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_layers import busybox_layer
from guest_vm import GuestVm
from remora import paths
from remora.images.guest_os import GuestImage, build_guest_image
from remora.wire.guest_v1 import Identity, SetupRequest

ENTROPY = bytes(range(32))


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    missing = [name for name in ("qemu-system-x86_64", "mkfs.erofs", "apt-get") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"microVM tests need {', '.join(missing)}: run scripts/system-packages.sh")
    return build_guest_image(paths.state_dir())


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_layer(tmp_path_factory.mktemp("layer"))


@pytest.fixture(scope="module", params=["serial", "vsock"])
def booted(guest_image: GuestImage, layer: Path, request: pytest.FixtureRequest) -> Iterator[GuestVm]:
    """A microVM whose container's root is set up; no process runs yet. Once with each kind of channel."""
    with GuestVm(guest_image, [layer], vsock=request.param == "vsock") as vm:
        identity = Identity(sandbox="box-1", hostname="fn-1", time_ns=time.time_ns(), entropy=ENTROPY)
        vm.call("Setup", SetupRequest(identity=identity, layers=vm.layers))
        yield vm
