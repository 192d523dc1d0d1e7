"""The guest's own kernel mounts our layers and overlays them: what a function sees is what the image's author meant."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Iterator

import pytest

from guest_layers import busybox_layer
from guest_vm import GuestVm, read_all
from image_maker import convert, directory, member, symlink, tar
from remora import paths
from remora.images.flatten import merge_layers
from remora.images.guest_os import build_guest_image
from remora.wire.guest_v1 import Identity, Process, SetupRequest, StartRequest, WaitRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

SIZES = (0, 1, 2048, 2049, 4032, 4096, 4097, 100_000)
CONTENT = {size: random.Random(size).randbytes(size) for size in SIZES}
LOWER = tar(
    *(member(f"data/{size}", content) for size, content in CONTENT.items()),
    *(member(f"many/{'n' * (number % 150)}{number}") for number in range(1500)),
    member("data/hard", kind=b"1", target="data/4097"),
    directory("gone"),
    member("gone/file", b"lower"),
    directory("opaque"),
    member("opaque/lower", b"lower"),
    directory("mixed", 0o750, uid=5, gid=6),
    member("mixed/hidden", b"lower"),
    member("mixed/kept", b"lower", mode=0o4711, uid=1234, gid=70000, mtime=1234567890),
)
UPPER = tar(
    member(".wh.gone"),
    directory("opaque"),
    member("opaque/.wh..wh..opq"),
    member("opaque/upper", b"upper"),
    directory("mixed", 0o700),
    member("mixed/.wh.hidden"),
    symlink("mixed/link", "kept"),
)


@pytest.fixture(scope="module", params=["stacked", "flattened"])
def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    """A microVM on busybox and both layers: as three disks, or as one that Remora merged."""
    missing = [name for name in ("qemu-system-x86_64", "mkfs.erofs", "apt-get") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"microVM tests need {', '.join(missing)}: run scripts/system-packages.sh")
    folder = tmp_path_factory.mktemp("layers")
    layers = [busybox_layer(folder), convert(LOWER, folder / "lower"), convert(UPPER, folder / "upper")]
    if request.param == "flattened":
        with open(folder / "merged", "w+b") as out:
            merge_layers(tuple(layers[1:]), out, b"m" * 16)
        layers = [layers[0], folder / "merged"]
    with GuestVm(build_guest_image(paths.state_dir()), layers) as vm:
        identity = Identity(sandbox="box", hostname="box", time_ns=time.time_ns(), entropy=bytes(32))
        vm.call("Setup", SetupRequest(identity=identity, layers=vm.serials))
        vm.call("Start", StartRequest(id="main", process=Process(args=["sleep", "100000"])))
        yield vm


def _sh(vm: GuestVm, script: str) -> str:
    name = hashlib.sha256(script.encode()).hexdigest()[:12]
    vm.call("Start", StartRequest(id=name, process=Process(args=["sh", "-c", script])))
    with vm.attach(name, "stdout") as stdout:
        text = read_all(stdout).decode()
    vm.call("Wait", WaitRequest(id=name))
    return text


def test_every_byte_arrives(vm: GuestVm) -> None:
    rows = [line.split() for line in _sh(vm, "cd /data; sha256sum *").splitlines()]
    sums = {name: digest for digest, name in rows}
    expected = {str(size): hashlib.sha256(content).hexdigest() for size, content in CONTENT.items()}
    assert sums == {**expected, "hard": expected["4097"]}


def test_a_directory_of_many_names_is_complete(vm: GuestVm) -> None:
    names = _sh(vm, "ls /many").split()
    assert sorted(names) == sorted(f"{'n' * (number % 150)}{number}" for number in range(1500))


def test_whiteouts_hide_what_lies_below(vm: GuestVm) -> None:
    assert _sh(vm, "[ -e /gone ] || echo gone") == "gone\n"
    assert _sh(vm, "ls /opaque") == "upper\n"
    assert _sh(vm, "ls /mixed") == "kept\nlink\n"
    assert _sh(vm, "cat /mixed/link") == "lower"


def test_owners_modes_and_times_are_those_of_the_image(vm: GuestVm) -> None:
    assert _sh(vm, "stat -c '%a %u %g %Y' /mixed/kept") == "4711 1234 70000 1234567890\n"
    assert _sh(vm, "stat -c '%a %u %g' /mixed") == "700 0 0\n"


def test_the_function_may_write_over_everything(vm: GuestVm) -> None:
    script = (
        "echo new > /mixed/kept && rm -r /many && mkdir /gone && echo ok > /gone/file && cat /mixed/kept /gone/file"
    )
    assert _sh(vm, script) == "new\nok\n"
