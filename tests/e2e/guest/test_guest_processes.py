"""A container in a real microVM behaves as if its processes ran here: streams, statuses, signals, terminals, users."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time

import pytest

from guest_vm import GuestVm, read_all, read_until
from remora.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from remora.wire.guest_v1 import (
    CloseStdinRequest,
    DevicesResponse,
    Process,
    ResizeRequest,
    SignalRequest,
    StartRequest,
    StatsResponse,
    WaitRequest,
    WaitResponse,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

_counter = 0


@pytest.fixture(scope="module")
def vm(booted: GuestVm) -> GuestVm:
    """A microVM whose main process waits; tests run their own processes beside it."""
    booted.call("Start", StartRequest(id="main", process=Process(args=["sleep", "100000"])))
    return booted


def start(vm: GuestVm, *args: str, **options: object) -> str:
    global _counter
    _counter += 1
    name = f"t{_counter}"
    vm.call("Start", StartRequest(id=name, process=Process(args=list(args), **options)))
    return name


def wait(vm: GuestVm, name: str) -> int:
    answer = vm.call("Wait", WaitRequest(id=name))
    assert isinstance(answer, WaitResponse)
    return answer.exit_status


def output(vm: GuestVm, *args: str, **options: object) -> str:
    name = start(vm, *args, **options)
    with vm.attach(name, "stdout") as stdout:
        text = read_all(stdout).decode()
    wait(vm, name)
    return text


def test_both_streams_and_the_status_pass_through(vm: GuestVm) -> None:
    name = start(vm, "sh", "-c", "echo out; echo err >&2; exit 7")
    with vm.attach(name, "stdout") as stdout, vm.attach(name, "stderr") as stderr:
        assert (read_all(stdout), read_all(stderr)) == (b"out\n", b"err\n")
    assert wait(vm, name) == 7


def test_a_stream_attached_before_the_process_starts_is_its_stream(vm: GuestVm) -> None:
    with vm.attach("early", "stdout") as stdout, vm.attach("early", "stdin") as stdin:
        stdin.sendall(b"from before\n")
        stdin.shutdown(socket.SHUT_WR)
        vm.call("Start", StartRequest(id="early", process=Process(args=["cat"], stdin=True)))
        assert read_all(stdout) == b"from before\n"
    assert wait(vm, "early") == 0


def test_output_of_an_ended_process_waits_for_whoever_attaches(vm: GuestVm) -> None:
    name = start(vm, "echo", "late")
    assert wait(vm, name) == 0
    with vm.attach(name, "stdout") as stdout:
        assert read_all(stdout) == b"late\n"


def test_wait_answers_only_after_the_output_was_handed_over(vm: GuestVm) -> None:
    name = start(vm, "sh", "-c", "read x; head -c 3000000 /dev/zero", stdin=True)
    with vm.attach(name, "stdout") as stdout, vm.attach(name, "stdin") as stdin:
        waiter = threading.Thread(target=wait, args=(vm, name))
        waiter.start()
        stdin.sendall(b"go\n")
        assert len(read_until(stdout, 1_000_000)) >= 1_000_000
        assert waiter.is_alive()  # two million bytes are more than pipe, windows and sockets hold
        read_all(stdout)
        waiter.join()


@pytest.mark.parametrize("size_mb", [8, pytest.param(100, marks=pytest.mark.slow)], ids=lambda size: f"{size}MB")
def test_stdin_comes_back_unchanged_through_stdout(vm: GuestVm, size_mb: int) -> None:
    name = start(vm, "cat", stdin=True)
    sent, got = hashlib.sha256(), hashlib.sha256()
    with vm.attach(name, "stdout") as stdout, vm.attach(name, "stdin") as stdin:

        def feed() -> None:
            for _ in range(size_mb):
                block = os.urandom(1_000_000)
                sent.update(block)
                stdin.sendall(block)
            stdin.shutdown(socket.SHUT_WR)

        feeder = threading.Thread(target=feed)
        feeder.start()
        while block := stdout.recv(1 << 18):
            got.update(block)
        feeder.join()
    assert got.digest() == sent.digest()
    assert wait(vm, name) == 0


def test_a_process_without_stdin_reads_end_of_file(vm: GuestVm) -> None:
    assert output(vm, "sh", "-c", "cat; echo done") == "done\n"


def test_close_stdin_is_end_of_file(vm: GuestVm) -> None:
    name = start(vm, "cat", stdin=True)
    with vm.attach(name, "stdout") as stdout:
        vm.call("CloseStdin", CloseStdinRequest(id=name))
        assert read_all(stdout) == b""
    assert wait(vm, name) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_ends_a_process_with_its_status(vm: GuestVm, number: signal.Signals) -> None:
    name = start(vm, "sleep", "1000")
    vm.call("Signal", SignalRequest(id=name, signal=number))
    assert wait(vm, name) == 128 + number


def test_a_process_may_handle_a_signal(vm: GuestVm) -> None:
    name = start(vm, "sh", "-c", "trap 'echo got it; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    with vm.attach(name, "stdout") as stdout:
        read_until(stdout, 3)
        vm.call("Signal", SignalRequest(id=name, signal=signal.SIGTERM))
        assert read_all(stdout) == b"got it\n"
    assert wait(vm, name) == 3


def test_a_terminal_has_the_size_asked_for_and_follows_it(vm: GuestVm) -> None:
    name = start(vm, "sh", "-c", "stty size; read x; stty size", terminal=True, rows=31, columns=97)
    with vm.attach(name, "tty") as tty:
        assert read_until(tty, 7).startswith(b"31 97\r\n")
        vm.call("Resize", ResizeRequest(id=name, rows=20, columns=60))
        tty.sendall(b"\n")
        assert b"20 60\r\n" in read_all(tty)
    assert wait(vm, name) == 0


def test_control_c_on_a_terminal_interrupts(vm: GuestVm) -> None:
    name = start(vm, "sh", "-c", "echo up; exec sleep 1000", terminal=True)
    with vm.attach(name, "tty") as tty:
        read_until(tty, 4)
        tty.sendall(b"\x03")
        assert wait(vm, name) == 130


def test_user_environment_and_directory_are_as_asked(vm: GuestVm) -> None:
    text = output(vm, "sh", "-c", "id; pwd; echo $A $HOME", user="alice", cwd="/tmp", env=["A=b c"])
    assert text == "uid=1000(alice) gid=1000(alice) groups=44(video),1000(alice)\n/tmp\nb c /home/alice\n"


def test_the_container_has_the_sandboxes_host_name(vm: GuestVm) -> None:
    assert output(vm, "sh", "-c", "hostname; cat /etc/hostname") == "fn-1\nfn-1\n"


def test_the_sdk_is_there_to_be_imported(vm: GuestVm) -> None:
    listing = output(vm, "ls", "/run/remora", "/run/remora/sdk/remora").split()
    assert {"accel.sock", "guest.sock", "sdk", "__init__.py", "client"} <= set(listing)


def test_a_missing_command_is_named(vm: GuestVm) -> None:
    with pytest.raises(NotFoundError, match="no-such-command"):
        start(vm, "no-such-command")


def test_ended_processes_are_remembered_but_not_all_of_them(vm: GuestVm) -> None:
    first = start(vm, "true")
    for _ in range(66):
        wait(vm, start(vm, "true"))
    with pytest.raises(NotFoundError):
        wait(vm, first)


def test_an_unknown_user_is_refused_with_those_there_are(vm: GuestVm) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no user 'bob'.*root, alice"):
        start(vm, "true", user="bob")


def test_a_process_id_is_used_once(vm: GuestVm) -> None:
    name = start(vm, "true")
    with pytest.raises(AlreadyExistsError):
        vm.call("Start", StartRequest(id=name, process=Process(args=["true"])))


def test_an_unknown_process_is_not_found(vm: GuestVm) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        vm.call("Wait", WaitRequest(id="nobody"))


def test_resize_needs_a_terminal(vm: GuestVm) -> None:
    with pytest.raises(FailedPreconditionError, match="no terminal"):
        vm.call("Resize", ResizeRequest(id="main", rows=10, columns=10))


def test_ended_processes_leave_no_zombies(vm: GuestVm) -> None:
    for _ in range(3):
        wait(vm, start(vm, "true"))
    states = output(vm, "sh", "-c", "grep -h State /proc/[0-9]*/status")
    assert "State" in states
    assert "Z" not in states


def test_stats_tell_the_containers_use_and_limits(vm: GuestVm) -> None:
    stats = vm.call("Stats")
    assert isinstance(stats, StatsResponse)
    assert 0 < stats.memory_bytes < stats.memory_limit_bytes < stats.guest_memory_total_bytes
    assert stats.processes >= 1
    assert stats.cpu_us > 0


def test_no_accelerator_is_among_the_guests_devices(vm: GuestVm) -> None:
    devices = vm.call("Devices")
    assert isinstance(devices, DevicesResponse)
    buses = {entry.split(":")[0] for entry in devices.devices}
    drivers = {entry.rsplit(":", 1)[1] for entry in devices.devices if entry.startswith("virtio:")}
    assert "pci" not in buses
    # A channel, of one kind or the other, and disks: nothing else.
    assert drivers in ({"virtio_blk", "virtio_console"}, {"virtio_blk", "vmw_vsock_virtio_transport"})
    assert not [node for node in devices.nodes if "nvidia" in node or "dri" in node or "kfd" in node]
    assert "/dev/null" in devices.nodes


def test_a_function_cannot_open_the_guests_own_devices(vm: GuestVm) -> None:
    code = "mknod /tmp/disk b 254 0; mknod /tmp/ok c 1 3; head -c 1 /tmp/disk; echo x >/tmp/ok && echo null works"
    name = start(vm, "sh", "-c", code)
    with vm.attach(name, "stdout") as stdout, vm.attach(name, "stderr") as stderr:
        assert read_all(stdout) == b"null works\n"
        assert b"/tmp/disk: Operation not permitted" in read_all(stderr)


def test_a_function_cannot_take_away_its_way_to_the_accelerator(vm: GuestVm) -> None:
    assert output(vm, "sh", "-c", "rm -f /run/remora/accel.sock 2>/dev/null || echo kept") == "kept\n"


def test_a_rejected_accelerator_stream_closes_the_connection(vm: GuestVm) -> None:
    # This microVM's host serves no accelerator.
    code = "import socket; s = socket.socket(1); s.connect('/run/remora/accel.sock'); print(s.recv(9))"
    assert output(vm, "python3", "-S", "-c", code) == "b''\n"


def test_the_sdk_imports_in_the_images_python_and_finds_its_address(vm: GuestVm) -> None:
    code = "import os, remora, remora.errors; print(remora.__file__, os.environ['REMORA_ADDRESS'])"
    text = output(vm, "python3", "-S", "-c", code, env=["PYTHONPATH=/opt"])
    assert text == "/run/remora/sdk/remora/__init__.py unix:///run/remora/accel.sock\n"


def test_ready_returns_at_once_where_nobody_makes_a_template(vm: GuestVm) -> None:
    code = "import socket; s = socket.socket(1); s.connect('/run/remora/guest.sock'); "
    code += "s.send(b'READY\\n'); print(s.recv(99))"
    assert output(vm, "python3", "-S", "-c", code).startswith("b'GO ")


def test_guest_time_is_the_hosts(vm: GuestVm) -> None:
    assert abs(int(output(vm, "date", "+%s")) - time.time()) < 5
