"""`remora run` behaves like a local command: streams, status, signals, terminal, time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import random
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from microvms import Remora, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120), pytest.mark.usefixtures("clean")]


def test_both_streams_and_the_exit_status_pass_through(remora: Remora) -> None:
    done = remora("run", "--no-accel", remora.image, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


@pytest.mark.slow
def test_100_megabytes_go_through_unchanged(remora: Remora) -> None:
    block = random.Random(1).randbytes(1 << 20)
    count = 100
    sent, received = hashlib.sha256(), hashlib.sha256()
    with remora.start("run", "--no-accel", remora.image, "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        def feed() -> None:
            for number in range(count):
                data = block[number:] + block[:number]
                sent.update(data)
                stdin.write(data)
            stdin.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        size = 0
        while data := process.stdout.read(1 << 16):
            received.update(data)
            size += len(data)
        feeder.join()
        assert process.wait(60) == 0
    assert size == count << 20
    assert received.digest() == sent.digest()


def test_a_closed_stdout_ends_the_process_as_sigpipe_does(remora: Remora) -> None:
    with remora.start("run", "--no-accel", remora.image, "yes") as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGPIPE


def test_a_timeout_ends_the_process_with_status_124(remora: Remora) -> None:
    began_s = time.monotonic()
    done = remora(
        "run", "--no-accel", "--timeout", "500ms", remora.image, "sh", "-c", "trap '' TERM; sleep 60 & wait; sleep 60"
    )
    assert done.returncode == 124
    assert time.monotonic() - began_s < 30


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_process(remora: Remora, template: str, signum: signal.Signals) -> None:
    """The function has no handlers: each of these ends it, and the status says which."""
    with remora.start("run", "--no-accel", "--template", template) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signum)
        # Python turns SIGINT into KeyboardInterrupt and then dies of SIGINT all the same.
        assert process.wait(30) == 128 + signum


def test_a_process_can_handle_ctrl_c_and_a_second_one_ends_it_anyway(remora: Remora) -> None:
    script = (
        "import signal, time\n"
        "signal.signal(2, lambda *_: print('no', flush=True))\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(9)\n"
    )
    with remora.start("run", "--no-accel", remora.image, "python3", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"no\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_terminal_has_our_size_and_follows_it(remora: Remora) -> None:
    script = (
        "import os, signal, sys\n"
        "def show(): print('size', *os.get_terminal_size(), os.isatty(0), os.isatty(2), flush=True)\n"
        # Waited for and not handled: a handler would miss a signal that comes just before input() reads.
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})\n"
        "show()\n"
        "signal.sigwait({signal.SIGWINCH})\n"
        "show()\n"
        "sys.exit(input() == 'done' and 5)\n"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 101, 0, 0))
    before = termios.tcgetattr(slave)
    try:
        with remora.start(
            *("run", "--no-accel", "-t", remora.image, "python3", "-c", script),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        ) as process:
            # The carriage return is the guest's terminal's: ours is raw.
            read_until(master, b"size 101 41 True True\r\n")
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
            process.send_signal(signal.SIGWINCH)
            read_until(master, b"size 90 30 True True")
            os.write(master, b"done\r")
            assert process.wait(30) == 5
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def read_until(fd: int, words: bytes) -> None:
    seen = b""
    deadline_s = time.monotonic() + 60
    while words not in seen:
        assert select.select([fd], [], [], max(0, deadline_s - time.monotonic()))[0], f"only {seen!r} came"
        seen += os.read(fd, 4096)


def test_environment_directory_user_and_mounts(remora: Remora, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("from the host\n")
    packed = tmp_path / "packed.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", str(packed), str(tmp_path / "data")], check=True)
    (tmp_path / "env").write_text("# a comment\nA=file\nB=file\n")
    script = (
        'echo "$A $B"; pwd; id -u; id -g; cat /mnt/dir/file /mnt/image/file; '
        "touch /mnt/scratch/x && echo scratch; touch /mnt/dir/x || echo refused; hostname"
    )
    done = remora(
        *("run", "--no-accel", "--env-file", str(tmp_path / "env"), "-e", "B=option", "-w", "/tmp", "-u", "33:34"),
        *("--mount", "type=tmpfs,dst=/mnt/scratch", "--mount", f"type=bind,src={tmp_path}/data,dst=/mnt/dir,ro"),
        *("--mount", f"type=image,src={packed},dst=/mnt/image,ro", "--hostname", "lamp"),
        *(remora.image, "sh", "-c", script),
    )
    lines = done.stdout.decode().splitlines()
    assert lines[:6] == ["file option", "/tmp", "33", "34", "from the host", "from the host"], done.stderr.decode()
    assert lines[-2:] == ["refused", "lamp"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nosuch"], 3, "no image is called nosuch"),
        (["-m", "10M", "IMAGE"], 2, "too small"),
        (["-m", "much", "IMAGE"], 2, "is no memory size (write it like 256M or 1G)"),
        (["--mount", "type=bind,src=/etc,dst=/x", "IMAGE"], 2, "shares no writable files with its host"),
        (["--mount", "type=bind,src=/nosuch,dst=/x,ro", "IMAGE"], 2, "/nosuch does not exist"),
        (["-t", "IMAGE"], 2, "stdin is no terminal"),
        (["--template", "nosuch"], 3, "no template is called 'nosuch'"),
        (["--name", "a/b", "IMAGE"], 2, "cannot name a microVM"),
        ([], 2, "no image was named"),
    ],
)
def test_bad_input_gets_one_clear_line(remora: Remora, arguments: list[str], status: int, words: str) -> None:
    done = remora("run", "--no-accel", *(remora.image if each == "IMAGE" else each for each in arguments))
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n")) == (status, 1), said
    assert words in said


def test_a_program_that_is_not_there_has_a_shells_status(remora: Remora) -> None:
    done = remora("run", "--no-accel", remora.image, "nosuch")
    assert done.returncode == 127
    assert b"nosuch" in done.stderr


def test_without_qemu_the_package_is_named(remora: Remora) -> None:
    done = remora("run", "--no-accel", remora.image, env={"PATH": "/nowhere"})
    assert done.returncode == 7
    assert b"apt-get install qemu-system-x86" in done.stderr


def test_without_an_agent_there_is_one_line_of_warning(remora: Remora) -> None:
    done = remora("run", remora.image, "sh", "-c", "echo $REMORA_ADDRESS")
    assert (done.returncode, done.stdout) == (0, b"unix:///run/remora/accel.sock\n")
    assert done.stderr.count(b"\n") == 1
    assert b"start one: remora agent" in done.stderr


def test_two_microvms_can_not_have_one_name(remora: Remora, template: str) -> None:
    with remora.start("run", "--no-accel", "--name", "twin", "--template", template) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith(b"twin ")
        done = remora("run", "--no-accel", "--name", "twin", "--template", template)
        assert done.returncode == 4
        assert b"a microVM named 'twin' exists" in done.stderr
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait(30) == 0
    wait_until(lambda: not remora.records(), "the record is gone")
