"""microVMs and the node agent together: attached by identity, sessions forked to clones, the agent killed and back."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_leftovers
from microvms import Remora, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

PING = "import remora\nwith remora.connect() as s: s.ping(); print('pong', flush=True)"
FUNCTION = """\
import sys, remora
session = remora.connect()
session.ping()
print('warm', flush=True)
remora.ready()
for line in sys.stdin:
    session.ping()
    print('pong', flush=True)
"""


class Agent:
    """An agent on the default sockets of a run-time directory."""

    def __init__(self, remora: Remora, state: Path) -> None:
        self._remora = remora
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None
        self.log = state.with_suffix(".log")

    def start(self) -> None:
        read_end, write_end = os.pipe()
        listen = ("--listen", f"unix://{self._remora.runtime}/accel.sock", "--listen", "oip+attached")
        command = self._remora.command("agent", "--state", str(self._state), "--ready-fd", str(write_end), *listen)
        with self.log.open("ab") as log, os.fdopen(read_end) as ready:
            self._process = subprocess.Popen(command, env=self._remora.env, stderr=log, pass_fds=[write_end])
            os.close(write_end)
            assert ready.readline(), self.log.read_text()

    def stop(self, signum: int = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signum)
            process.wait(30)


@pytest.fixture(scope="module")
def host(image: str) -> Iterator[tuple[Remora, Agent]]:
    directory = run_leftovers.directory("ra-")
    remora = Remora(directory / "run", image)
    agent = Agent(remora, directory / "agent")
    agent.start()
    try:
        yield remora, agent
        left = remora("ps", "-aq").stdout.split()
        assert left == []
    finally:
        agent.stop()
        shutil.rmtree(directory, ignore_errors=True)


Host = tuple[Remora, Agent]
#: What a stock client would do, without one: the image has nothing but Python.
STOCK = """\
import socket
body = b'{"inputs": [{"name": "input", "shape": [1, 1, 1, 1], "datatype": "FP32", "data": [2.5]}]}'
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("/run/remora/oip.sock")
    lines = ["POST /v2/models/identity/infer HTTP/1.1", "Host: x", "Connection: close"]
    lines.append("Content-Length: %d" % len(body))
    sock.sendall("\\r\\n".join([*lines, "", ""]).encode() + body)
    got = b""
    while piece := sock.recv(4096):
        got += piece
print(got.split(b"\\r\\n")[0].decode(), b"[2.5]" in got)
"""


def test_a_stock_client_in_a_microvm_reaches_the_agent_as_its_sandbox(host: Host) -> None:
    remora, _agent = host
    done = remora("run", remora.image, "python3", "-c", STOCK)
    assert (done.returncode, done.stdout) == (0, b"HTTP/1.1 200 OK True\n"), done.stderr.decode()


def test_a_function_reaches_the_agent_and_is_detached_at_its_end(host: Host) -> None:
    remora, agent = host
    done = remora("run", "--tenant", "blue", remora.image, "python3", "-c", PING)
    assert (done.returncode, done.stdout) == (0, b"pong\n"), done.stderr.decode()
    assert done.stderr == b""
    assert "tenant=blue" in agent.log.read_text()
    wait_until(lambda: "sandbox detached" in agent.log.read_text(), "the sandbox is detached")


def test_no_accel_is_no_way_to_the_agent(host: Host) -> None:
    remora, _ = host
    done = remora("run", "--no-accel", remora.image, "python3", "-c", PING)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"UnavailableError" in done.stderr


def test_clones_go_on_with_a_fork_of_the_templates_session(host: Host) -> None:
    remora, agent = host
    name = f"test-{secrets.token_hex(4)}"
    made = remora("template", "create", name, remora.image, "python3", "-c", FUNCTION)
    assert made.returncode == 0, made.stderr.decode()
    assert b"warm" in made.stderr
    try:
        for _ in range(2):
            done = remora("run", "--template", name, stdin=b"x\nx\n")
            assert (done.returncode, done.stdout) == (0, b"pong\npong\n"), done.stderr.decode()
        assert agent.log.read_text().count("session forked") == 2
    finally:
        assert remora("template", "remove", name).returncode == 0


def test_a_running_microvm_has_its_accelerator_again_after_the_agent_was_killed(host: Host) -> None:
    remora, agent = host
    sandbox = remora("run", "-d", remora.image, "sh", "-c", "while :; do sleep 0.2; done").stdout.decode().strip()
    try:
        agent.stop(signal.SIGKILL)
        agent.start()
        wait_until(
            lambda: remora("exec", sandbox, "python3", "-c", PING).returncode == 0, "an answer through the new agent"
        )
    finally:
        remora("rm", "-f", sandbox)
