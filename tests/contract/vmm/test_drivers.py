"""What every driver promises (vmm/contract.py), on each monitor: QEMU for real, Firecracker and Cloud Hypervisor on a
fake that takes only what their API descriptions allow, and on the real programs where they are installed and KVM works.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fake_jailer
import fake_vmm
from remora import paths
from remora.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError
from remora.guest.kernel import OS_DISK_SERIAL, kernel_arguments
from remora.images.guest_os import build_guest_image
from remora.reactor import Reactor
from remora.sandboxes.guest import Guest, connect_when_up
from remora.vmm import channel
from remora.vmm import jail as jails
from remora.vmm.bridge import Bridge
from remora.vmm.cloud_hypervisor import CloudHypervisorDriver
from remora.vmm.contract import Disk, Driver, Machine, VmSpec
from remora.vmm.firecracker import FirecrackerDriver
from remora.vmm.qemu import QemuDriver
from remora.vmm.tsc import host_tsc_khz

CALL_S = 30.0
BOOT_S = 60.0
FIRECRACKERS = ("0.25.2", "1.16.1", "1.17.0")


class Rig:
    """A driver, a machine that it can boot, and a way to ask whoever is inside."""

    def __init__(self, driver: Driver, folder: Path, spec: VmSpec) -> None:
        self.driver = driver
        self.folder = folder
        self.spec = spec
        self._running: list[Callable[[], None]] = []

    def directory(self, name: str) -> Path:
        directory = self.folder / name
        directory.mkdir()
        return directory

    def start(self, name: str, spec: VmSpec | None = None) -> Machine:
        """Start a machine in a directory of its own; it is closed at the end of the test."""
        machine = self.driver.start(spec or self.spec, directory=self.directory(name))
        self._running.append(machine.close)
        return machine

    def boot(self, name: str, spec: VmSpec | None = None) -> Machine:
        machine = self.start(name, spec)
        machine.connect(CALL_S)
        return machine

    def answers(self, machine: Machine) -> bool:
        """Whether the guest answers a fresh stream."""
        with channel.connect(machine.channel_directory, 7, CALL_S) as stream:
            stream.sendall(b"anybody?")
            return stream.recv(64) == b"anybody?"

    def memory(self, machine: Machine) -> str:
        """Something that lies in the guest's memory and tells machines apart that were booted apart."""
        with channel.connect(machine.channel_directory, 11, CALL_S) as stream:
            return stream.makefile().read()

    def remembers(self, machine: Machine, what: str) -> bool:
        return self.memory(machine) == what

    def close(self) -> None:
        for close in reversed(self._running):
            close()


class QemuRig(Rig):
    """QEMU carries a byte stream, so the host's bridge belongs to each machine."""

    def start(self, name: str, spec: VmSpec | None = None) -> Machine:
        ours, guests = socket.socketpair()
        with guests:
            directory = self.directory(name)
            machine = self.driver.start(spec or self.spec, directory=directory, channel_fd=guests.fileno())
        reactor = Reactor()
        bridge = Bridge(reactor, ours, directory, on_end=lambda _error: None)
        thread = threading.Thread(target=reactor.run)
        thread.start()

        def close() -> None:
            machine.close()
            reactor.stop()
            thread.join()
            bridge.close()
            reactor.close()

        self._running.append(close)
        return machine

    def answers(self, machine: Machine) -> bool:
        with connect_when_up(machine.channel_directory, BOOT_S) as guest:
            guest.ping()
        return True

    def memory(self, machine: Machine) -> str:
        with connect_when_up(machine.channel_directory, BOOT_S) as guest:
            return str(guest.stats().uptime_s)

    def remembers(self, machine: Machine, what: str) -> bool:
        # A clone has been up for as long as its template had; a machine that was booted begins at 0.
        return float(self.memory(machine)) >= float(what)


def _qemu(folder: Path) -> Rig:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed: run scripts/system-packages.sh")
    image = build_guest_image(paths.state_dir())
    spec = VmSpec(
        kernel=image.kernel,
        initrd=image.initrd,
        arguments=kernel_arguments(host_tsc_khz(paths.state_dir() / "host")),
        memory_mib=128,
        cpus=1,
        accelerator="tcg",
        disks=(Disk(OS_DISK_SERIAL, image.disk),),
    )
    return QemuRig(QemuDriver(), folder, spec)


def _files(folder: Path) -> VmSpec:
    names = ("kernel", "initrd", "os", "layer")
    kernel, initrd, os_disk, layer = (folder / name for name in names)
    for path in (kernel, initrd, os_disk, layer):
        path.write_bytes(b"\0" * 512)
    return VmSpec(
        kernel=kernel,
        initrd=initrd,
        arguments="console=ttyS0",
        memory_mib=128,
        cpus=1,
        accelerator="kvm",
        disks=(Disk(OS_DISK_SERIAL, os_disk), Disk("l00", layer)),
    )


def _firecracker(folder: Path, version: str) -> Rig:
    return Rig(FirecrackerDriver(fake_vmm.install(folder, "firecracker", version)), folder, _files(folder))


class JailedRig(Rig):
    """Each machine has a jail of its own, so a driver of its own, and a user of its own."""

    def start(self, name: str, spec: VmSpec | None = None) -> Machine:
        jail = self.jail(name)
        self._running.append(lambda: jails.remove(jail))
        self.driver = FirecrackerDriver(str(jail.binary), jail=jail, jailer=fake_jailer.install(self.folder, "1.17.0"))
        return super().start(name, spec)

    def jail(self, name: str) -> jails.Jail:
        binary = Path(fake_vmm.install(self.folder, "firecracker", "1.17.0"))
        user = 54000 + len(self._running)
        return jails.Jail(self.folder / "j", name, binary, uid=user, gid=user)


def _jailed(folder: Path) -> JailedRig:
    if os.geteuid() != 0:
        pytest.skip("the jailer needs root")
    return JailedRig(FirecrackerDriver(fake_vmm.install(folder, "firecracker", "1.17.0")), folder, _files(folder))


def _cloud_hypervisor(folder: Path) -> Rig:
    driver = CloudHypervisorDriver(fake_vmm.install(folder, "cloud-hypervisor", "53.0"))
    return Rig(driver, folder, _files(folder))


RIGS: dict[str, Callable[[Path], Rig]] = {
    "qemu": _qemu,
    **{f"fake-firecracker-{v}": lambda folder, v=v: _firecracker(folder, v) for v in FIRECRACKERS},  # type: ignore[misc]
    "fake-firecracker-jailed": _jailed,
    "fake-cloud-hypervisor-53.0": _cloud_hypervisor,
}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Unix socket paths end at 107 bytes, and pytest's own folders are long."""
    with tempfile.TemporaryDirectory(prefix="vmm") as name:
        yield Path(name)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.vm if name == "qemu" else ()) for name in RIGS])
def rig(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[Rig]:
    made = RIGS[request.param](short_folder)
    with contextlib.closing(made):
        yield made


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_machine_boots_and_answers_on_its_channel(rig: Rig) -> None:
    assert rig.answers(rig.boot("a"))


def test_a_paused_machine_goes_on_where_it_was(rig: Rig) -> None:
    if "1.16.1" in rig.driver.version:
        with pytest.raises(FailedPreconditionError, match="6074"):
            rig.boot("a").pause()
        return
    machine = rig.boot("a")
    assert rig.answers(machine)
    machine.pause()
    machine.resume()
    assert rig.answers(machine)


def test_clones_share_what_the_template_had_in_memory_and_have_channels_of_their_own(rig: Rig) -> None:
    template_spec = rig.spec._replace(ram_file=rig.folder / "ram")
    template = rig.boot("t", template_spec)
    assert rig.answers(template)
    remembered = rig.memory(template)
    template.save(rig.folder / "state", CALL_S)
    template.close()

    clone_spec = template_spec._replace(ram_private=True, incoming=True)
    clones = [rig.boot(name, clone_spec) for name in ("c1", "c2")]
    for clone in clones:
        clone.restore(rig.folder / "state", CALL_S)
    assert all(rig.remembers(clone, remembered) for clone in clones)
    assert clones[0].channel_directory != clones[1].channel_directory
    assert (rig.folder / "state").stat().st_mode & 0o777 == 0o600


def test_saving_never_writes_over_a_state(rig: Rig) -> None:
    (rig.folder / "state").write_text("somebody's")
    machine = rig.boot("t", rig.spec._replace(ram_file=rig.folder / "ram"))
    with pytest.raises(FileExistsError):
        machine.save(rig.folder / "state", CALL_S)
    assert (rig.folder / "state").read_text() == "somebody's"


def test_a_killed_machine_tells_how_it_ended(rig: Rig) -> None:
    machine = rig.boot("a")
    machine.kill()
    machine.close()
    ended = machine.reap()
    assert ended is not None
    assert ended.signal == signal.SIGKILL
    assert gone(machine.pid)


def test_a_monitor_dies_with_the_thread_that_started_it(rig: Rig) -> None:
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(rig.boot("a").pid))
    thread.start()
    thread.join()
    deadline_s = time.monotonic() + CALL_S
    while not gone(pids[0]) and os.waitpid(pids[0], os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(params=["firecracker", "cloud-hypervisor"])
def api_rig(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[Rig]:
    made = _firecracker(short_folder, "1.17.0") if request.param == "firecracker" else _cloud_hypervisor(short_folder)
    with contextlib.closing(made):
        yield made


def test_a_guest_reaches_only_ports_that_the_host_listens_on(api_rig: Rig) -> None:
    directory = api_rig.directory("listening")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(channel.guest_socket(directory, 2048)))
        listener.listen()
        machine = api_rig.driver.start(api_rig.spec, directory=directory)
        with contextlib.closing(machine):
            machine.connect(CALL_S)
            # From its first moment on: the host listened before the boot.
            first, _ = listener.accept()
            with first:
                assert first.recv(16) == b"up\n"
            with channel.connect(directory, 9, CALL_S) as stream:
                stream.sendall(b"2048 hello\n")
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.makefile("rb").read() == b"hello\n"
                    accepted.sendall(b"hi")
                assert stream.recv(16) == b"hi"
            with channel.connect(directory, 9, CALL_S) as stream:
                stream.sendall(b"4711 hello\n")
                assert stream.recv(16) == b"ECONNRESET\n"
            with pytest.raises(UnavailableError):
                channel.connect(directory, 12, CALL_S)


def test_what_the_monitor_refuses_is_told_with_its_own_words(api_rig: Rig) -> None:
    api_rig.spec.kernel.unlink()
    with pytest.raises(FailedPreconditionError, match="no such file"):
        api_rig.boot("a")


def test_a_monitor_that_ends_before_it_listens_is_not_waited_for(api_rig: Rig) -> None:
    machine = api_rig.start("a")
    machine.kill()
    began_s = time.monotonic()
    with pytest.raises(UnavailableError, match="before it took commands"):
        machine.connect(CALL_S)
    assert time.monotonic() - began_s < CALL_S / 2


def test_a_monitor_that_never_listens_is_given_up(api_rig: Rig) -> None:
    program = api_rig.folder / "sleeper"
    program.write_text("#!/bin/sh\ncase $1 in --version) echo Firecracker v1.17.0;; *) exec sleep 60;; esac\n")
    program.chmod(0o755)
    driver = type(api_rig.driver)(str(program))  # type: ignore[call-arg]
    machine = driver.start(api_rig.spec, directory=api_rig.directory("a"))
    with contextlib.closing(machine), pytest.raises(DeadlineExceededError):
        machine.connect(0.2)


def test_what_the_guest_prints_is_kept_for_error_messages(api_rig: Rig) -> None:
    machine = api_rig.boot("a")
    machine.kill()
    machine.close()
    ended = machine.reap()
    assert ended is not None
    assert "fake guest: up" in ended.console


def test_a_killed_monitors_sockets_do_not_stop_the_next_one(api_rig: Rig) -> None:
    directory = api_rig.directory("again")
    for _ in range(2):
        machine = api_rig.driver.start(api_rig.spec, directory=directory)
        machine.connect(CALL_S)
        machine.close()


def test_emulation_is_refused_by_name_where_the_monitor_needs_kvm(api_rig: Rig) -> None:
    with pytest.raises(FailedPreconditionError, match="needs KVM"):
        api_rig.start("a", api_rig.spec._replace(accelerator="tcg"))


def test_cloud_hypervisor_moves_a_running_machine_to_another_process(short_folder: Path) -> None:
    rig = _cloud_hypervisor(short_folder)
    with contextlib.closing(rig):
        source = rig.boot("source")
        remembered = rig.memory(source)
        target = rig.boot("target", rig.spec._replace(incoming=True))
        url = f"unix:{short_folder / 'migration'}"
        waiting = threading.Thread(target=target.receive_migration, args=(url, CALL_S))  # type: ignore[attr-defined]
        waiting.start()
        deadline_s = time.monotonic() + CALL_S
        while not (short_folder / "migration").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        source.send_migration(url, CALL_S)  # type: ignore[attr-defined]
        waiting.join()
        # The channel stays where the source had it; its directory outlives the source.
        assert rig.memory(source) == remembered


@pytest.mark.parametrize("make", [lambda folder: _firecracker(folder, "1.17.0"), _jailed], ids=["free", "jailed"])
def test_a_firecracker_template_may_move_after_it_was_saved(make: Callable[[Path], Rig], short_folder: Path) -> None:
    with contextlib.closing(make(short_folder)) as rig:
        drafts, final = short_folder / "draft", short_folder / "final"
        drafts.mkdir()
        disks = tuple(disk._replace(path=drafts / disk.path.name) for disk in rig.spec.disks)
        for old, new in zip(rig.spec.disks, disks, strict=True):
            old.path.rename(new.path)
        spec = rig.spec._replace(disks=disks, ram_file=drafts / "ram")
        template = rig.boot("t", spec)
        remembered = rig.memory(template)
        template.save(drafts / "state", CALL_S)
        template.close()
        drafts.rename(final)
        moved = tuple(disk._replace(path=final / disk.path.name) for disk in disks)
        clone = rig.boot("c", spec._replace(disks=moved, ram_file=final / "ram", ram_private=True, incoming=True))
        clone.restore(final / "state", CALL_S)
        assert rig.remembers(clone, remembered)


def test_a_jail_holds_the_machines_files_and_nothing_when_it_is_over(short_folder: Path) -> None:
    rig = _jailed(short_folder)
    with contextlib.closing(rig):
        machine = rig.boot("a")
        root = machine.channel_directory
        inside = {path.name for path in root.iterdir()}
        assert {"kernel", "initrd", "d0", "d1", "api.sock", "channel.sock"} <= inside
    assert list((short_folder / "j").iterdir()) == []


@pytest.mark.parametrize("kind", ["firecracker", "cloud-hypervisor"])
def test_the_real_monitor_boots_where_it_is_installed(kind: str, short_folder: Path) -> None:
    """Needs a real binary on PATH and KVM that boots guests; neither is on most test machines."""
    if shutil.which(kind) is None:
        pytest.skip(f"no {kind} on PATH")
    from remora.vmm.probe import accelerator

    image = build_guest_image(paths.state_dir())
    if accelerator(image.kernel, paths.state_dir() / "host") != "kvm":
        pytest.skip("KVM does not boot guests here")
    driver: Driver = FirecrackerDriver() if kind == "firecracker" else CloudHypervisorDriver()
    spec = VmSpec(
        kernel=image.kernel,
        initrd=image.initrd,
        arguments=kernel_arguments(None, vsock=True, disks=[OS_DISK_SERIAL]),
        memory_mib=128,
        cpus=1,
        accelerator="kvm",
        disks=(Disk(OS_DISK_SERIAL, image.disk),),
    )
    with contextlib.closing(driver.start(spec, directory=short_folder)) as machine:
        machine.connect(CALL_S)
        with Guest(machine.channel_directory, timeout_s=BOOT_S) as guest:
            guest.ping()
