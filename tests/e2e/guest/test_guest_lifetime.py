"""What needs a microVM of its own: the main process's end, templates, memory limits, a host that goes away."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from guest_vm import GuestVm, read_all, read_until
from remora.errors import FailedPreconditionError, NotFoundError
from remora.images.guest_os import GuestImage
from remora.wire.guest_v1 import (
    Identity,
    Mount,
    Process,
    SetupRequest,
    SignalRequest,
    StartRequest,
    WaitRequest,
    WaitResponse,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]


def set_up(vm: GuestVm, **options: object) -> None:
    identity = Identity(sandbox="box", hostname="box", time_ns=time.time_ns(), entropy=bytes(32))
    vm.call("Setup", SetupRequest(identity=identity, layers=vm.layers, **options))


def start_main(vm: GuestVm, *args: str, **options: object) -> None:
    vm.call("Start", StartRequest(id="main", process=Process(args=list(args), **options)))


def wait_main(vm: GuestVm) -> WaitResponse:
    answer = vm.call("Wait", WaitRequest(id="main"))
    assert isinstance(answer, WaitResponse)
    return answer


def test_main_obeys_sigterm_though_it_is_first_in_its_namespace_and_shutdown_ends_the_vm(
    guest_image: GuestImage, layer: Path
) -> None:
    with GuestVm(guest_image, [layer]) as vm:
        set_up(vm)
        with pytest.raises(NotFoundError, match="no-such-command"):
            start_main(vm, "no-such-command")
        start_main(vm, "sleep", "1000")  # a start that failed may be tried again
        vm.call("Signal", SignalRequest(id="main", signal=signal.SIGTERM))
        assert wait_main(vm).exit_status == 143
        vm.call("Shutdown")
        assert vm.process.wait(timeout=30) == 0
        assert "panic" not in vm.console


def test_a_template_waits_in_ready_until_it_is_resumed_with_a_new_identity(
    guest_image: GuestImage, layer: Path
) -> None:
    with GuestVm(guest_image, [layer], template=True) as vm:
        set_up(vm)
        ask = "import socket; s = socket.socket(1); s.connect('/run/remora/guest.sock'); s.send(b'READY\\n')"
        start_main(vm, "sh", "-c", f'python3 -S -c "{ask}; print(s.recv(99).decode())"; hostname; date +%Y; sleep 1000')
        with vm.attach("main", "stdout") as stdout:
            vm.call("WaitReady")
            vm.call("Sync")
            vm.call("Resume", Identity(sandbox="clone", hostname="clone-1", time_ns=2**62, entropy=bytes(64)))
            answer = read_until(stdout, 81).decode().split("\n")
        assert answer[0].startswith("GO ")
        assert len(bytes.fromhex(answer[0][3:])) == 32
        assert answer[2:4] == ["clone-1", "2116"]


def test_wait_ready_fails_when_main_ends_first(guest_image: GuestImage, layer: Path) -> None:
    with GuestVm(guest_image, [layer], template=True) as vm:
        set_up(vm)
        start_main(vm, "sh", "-c", "exit 5")
        with pytest.raises(FailedPreconditionError, match="status 5"):
            vm.call("WaitReady")


def test_a_function_that_needs_too_much_memory_is_ended_and_the_guest_goes_on(
    guest_image: GuestImage, layer: Path
) -> None:
    with GuestVm(guest_image, [layer]) as vm:
        set_up(vm, mounts=[Mount(type="tmpfs", destination="/big")], readonly_root=True)
        code = "open('/big/x', 'w').write('x'); print(open('/big/x').read(), flush=True)\n"
        code += "try: open('/x', 'w')\nexcept OSError as error: print(error, flush=True)\n"
        code += "kept = []\nwhile True: kept.append(b'x' * (1 << 20))"
        start_main(vm, "python3", "-S", "-c", code)
        with vm.attach("main", "stdout") as stdout:
            assert read_all(stdout) == b"x\n[Errno 30] Read-only file system: '/x'\n"
        answer = wait_main(vm)
        assert (answer.exit_status, answer.oom_killed) == (137, True)
        vm.call("Ping")


def test_a_new_host_finds_the_processes_of_the_old_one(guest_image: GuestImage, layer: Path) -> None:
    with GuestVm(guest_image, [layer]) as vm:
        set_up(vm)
        start_main(vm, "sh", "-c", "echo one; read x; echo two; exit 4", stdin=True)
        with vm.attach("main", "stdout") as stdout:
            assert read_until(stdout, 4) == b"one\n"
            vm.replace_host()
            assert stdout.recv(10) == b""
        with vm.attach("main", "stdin") as stdin, vm.attach("main", "stdout") as stdout:
            stdin.sendall(b"\n")
            assert read_all(stdout) == b"two\n"
        assert wait_main(vm).exit_status == 4


def test_the_forwarder_carries_both_directions_and_half_close(guest_image: GuestImage, layer: Path) -> None:
    accepted: list[socket.socket] = []
    arrived = threading.Event()

    def on_accelerator(sock: socket.socket) -> None:
        accepted.append(sock)
        arrived.set()

    with GuestVm(guest_image, [layer], on_accelerator=on_accelerator) as vm:
        set_up(vm)
        code = "import socket; s = socket.socket(1); s.connect('/run/remora/accel.sock'); s.send(b'request\\n'); "
        code += "s.shutdown(1); print(s.recv(99), s.recv(99))"
        start_main(vm, "python3", "-S", "-c", code)
        with vm.attach("main", "stdout") as stdout:
            assert arrived.wait(30)
            with accepted[0] as agent:
                assert read_all(agent) == b"request\n"
                agent.sendall(b"answer\n")
            assert read_all(stdout) == b"b'answer\\n' b''\n"
        assert wait_main(vm).exit_status == 0
