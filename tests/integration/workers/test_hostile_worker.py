"""A tenant may own its worker's code: nothing that it says, sends or does may hurt the agent or another tenant."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remora.catalog.architectures import identity
from remora.errors import AbortedError, FailedPreconditionError, RemoraError
from remora.reactor import Reactor
from remora.workers.contract import Job, ModelSource, ModelSpec, Result, TensorView
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings

#: A worker that behaves until it gets a job, and then runs `attack`. It has the real one's sockets and confinement.
BOOT = """
import sys, socket, json, mmap, os, struct, threading
sys.path[:0] = sys.argv[1].split(':')
jobs, control = (socket.socket(fileno=int(fd)) for fd in sys.argv[2:4])
def say(sock, message): sock.send(json.dumps(message).encode())
arenas = {{}}
def serve():
    while True:
        data, fds, _flags, _address = socket.recv_fds(control, 65536, 4)
        if not data: os._exit(0)
        message = json.loads(data)
        if message['t'] == 'arena':
            arenas[message['id']] = mmap.mmap(fds[0], message['size']), fds[0]
            say(control, {{'t': 'arena', 'id': message['id']}})
        if message['t'] == 'load':
            spec = [['input', 'float32', [-1, -1, -1, -1]]], [['output', 'float32', [-1, -1, -1, -1]]]
            say(control, {{'t': 'loaded', 'm': message['m'], 'inputs': spec[0], 'outputs': spec[1],
                           'device': 'cpu', 'mem': 1}})
say(control, {{'t': 'hello'}})
threading.Thread(target=serve).start()
while True:
    data = jobs.recv(65536)
    if not data: os._exit(0)
    job = dict(zip(('id', 'm', 'a'), struct.unpack_from('<BBHQII', data)[3:]))
    exec({attack!r})
"""

ATTACKS = {
    "random bytes": "jobs.send(os.urandom(5000))",
    "an empty object": "say(jobs, {})",
    "deep nesting": "jobs.send(b'[' * 50000)",
    "an answer to another job": "say(jobs, {'t': 'done', 'id': job['id'] + 1, 'us': 1, 'out': []})",
    "an answer without outputs": "say(jobs, {'t': 'done', 'id': job['id'], 'us': 1})",
    "an output outside its block": (
        "say(jobs, {'t': 'done', 'id': job['id'], 'us': 1, 'out': [['output', 'float32', [1, 1, 1, 1], 1 << 20, 4]]})"
    ),
    "an output before its block": (
        "say(jobs, {'t': 'done', 'id': job['id'], 'us': 1, 'out': [['output', 'float32', [1, 1, 1, 1], -4, 4]]})"
    ),
    "a packed answer cut short": "jobs.send(struct.pack('<BQQ', 0xB7, job['id'], 1))",
    "a packed answer without outputs": "jobs.send(struct.pack('<BQQQQ', 0xB7, job['id'], 1, 1, 0))",
    "a packed output outside its block": (
        "jobs.send(struct.pack('<BQQQQ', 0xB7, job['id'], 1, 1, 1 << 40)"
        " + json.dumps([['output', 'float32', [1, 1, 1, 1], 1 << 20, 4]]).encode())"
    ),
    "a packed answer that took for ever": (
        "jobs.send(struct.pack('<BQQQQ', 0xB7, job['id'], (1 << 64) - 1, 1, 0)"
        " + json.dumps([['output', 'float32', [1, 1, 1, 1], 0, 4]]).encode())"
    ),
    "a negative time": "say(jobs, {'t': 'failed', 'id': job['id'], 'us': -1, 'error': [3, 'x', '']})",
    "a wrong error": "say(jobs, {'t': 'failed', 'id': job['id'], 'us': 1, 'error': 'x'})",
    "an unknown message": "say(jobs, {'t': 'exec', 'id': job['id']})",
    "a second hello": "say(control, {'t': 'hello'})",
    "a model that nobody loads": "say(control, {'t': 'loaded', 'm': -1, 'inputs': [], 'outputs': []})",
    "a huge datagram": "jobs.send(b'{' + b' ' * 100000)",
    "a closed socket": "jobs.close(); control.close(); threading.Event().wait()",
    "a flood of errors": "os.write(2, b'x' * 65536 * 40); os._exit(3)",
}


class Rig:
    def __init__(self, directory: Path) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        self.pool = WorkerPool(
            self.reactor, WorkerSettings(device="cpu", threads=2, standby=0, backoff_first_s=0.01, stop_grace_s=0.2)
        )
        data = identity({})
        (directory / "m.onnx").write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.source = ModelSource("m", digest, directory / "m.onnx", "onnx")

    def until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end_s, "it did not happen in time"
            self.reactor.run_once(0.1)
        assert self.errors == []

    def load(self) -> ModelSpec | RemoraError:
        box: list[ModelSpec | RemoraError] = []
        self.pool.load("mallory", self.source, box.append)
        self.until(lambda: box)
        return box[0]

    def run(self) -> Result | RemoraError:
        box: list[Result | RemoraError] = []
        given = TensorView("input", "float32", (1, 1, 1, 1), memoryview(bytes(4)))
        self.pool.submit(Job("infer", "mallory", "mallory", "m", inputs=(given,)), box.append)
        self.until(lambda: box)
        return box[0]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.pool.close()
    made.reactor.close()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_hostile_answer_costs_the_worker_its_life_and_nobody_else(
    rig: Rig, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remora.workers.launcher.BOOT", BOOT.format(attack=attack))
    assert isinstance(rig.load(), ModelSpec)
    outcome = rig.run()
    assert type(outcome) is AbortedError
    assert rig.pool._arenas["mallory"].used == 0
    monkeypatch.undo()
    # The worker that comes next is an honest one: the domain has taken no harm.
    rig.until(lambda: any(info.models for info in rig.pool.workers()))
    result = rig.run()
    assert isinstance(result, Result)
    result.release()


def test_descriptors_that_a_worker_sends_do_not_reach_the_agent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = (
        "socket.send_fds(jobs, [json.dumps({'t': 'failed', 'id': job['id'], 'us': 1, 'error': [3, 'x', '']}).encode()],"
        " [0, 0, 0])"
    )
    monkeypatch.setattr("remora.workers.launcher.BOOT", BOOT.format(attack=attack))
    rig.load()
    rig.run()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert str(rig.run()) == "x"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_cannot_cut_the_memory_under_the_agent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = """
try:
    os.ftruncate(arenas[job['a']][1], 0)
    outcome = 'cut'
except PermissionError:
    outcome = 'refused'
say(jobs, {'t': 'failed', 'id': job['id'], 'us': 1, 'error': [3, outcome, '']})
"""
    monkeypatch.setattr("remora.workers.launcher.BOOT", BOOT.format(attack=attack))
    rig.load()
    assert str(rig.run()) == "refused"
    rig.pool.allocate("mallory", 100).view[:] = bytes(100)


def test_a_worker_that_never_says_hello_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remora.workers.launcher.BOOT", "import sys; sys.exit('hostile from the start')")
    outcome = rig.load()
    assert type(outcome) is FailedPreconditionError
    assert "hostile from the start" in str(outcome)
