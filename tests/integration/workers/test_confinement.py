"""What a worker can reach from inside, and what is left when the agent is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from remora.reactor import Reactor
from remora.workers import launcher
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings

#: Tries everything from inside the confinement, after the worker's own preparation, and reports on its job socket.
PROBE = """
import sys
sys.path[:0] = sys.argv[1].split(':')
import ctypes, json, os, socket, resource, threading
from remora.workers import inside, main, seccomp
jobs = socket.socket(fileno=int(sys.argv[2]))
seen = {'root': sorted(os.listdir('/')), 'environment': sorted(os.environ), 'pid': os.getpid(), 'cwd': os.getcwd()}
seen['cwd_entries'] = os.listdir('.')
seen['processes'] = os.path.exists('/proc/1')
with open('/proc/cpuinfo') as file: pass
inside.confine_self(int(sys.argv[4]), int(sys.argv[5]))
def attempt(name, call):
    try:
        seen[name] = repr(call())
    except BaseException as error:
        seen[name] = type(error).__name__
libc = ctypes.CDLL(None, use_errno=True)
def connect():
    sock = socket.socket()
    sock.settimeout(1)
    return sock.connect(('127.0.0.1', int(sys.argv[-1])))
for stage in ('bare', 'filtered'):
    attempt(stage + ' hosts', lambda: open('/etc/passwd').read())
    attempt(stage + ' home', lambda: os.listdir('/root'))
    attempt(stage + ' write', lambda: open('/empty/x', 'w'))
    attempt(stage + ' write root', lambda: open('/x', 'w'))
    attempt(stage + ' write package', lambda: open(main.__file__, 'a'))
    attempt(stage + ' connect', connect)
    attempt(stage + ' unix', lambda: socket.socket(socket.AF_UNIX).connect('\\0remora-test-' + sys.argv[-1]))
    attempt(stage + ' mount', lambda: libc.mount(b'none', b'/empty', b'tmpfs', 0, None))
    attempt(stage + ' namespace', lambda: libc.unshare(0x10000000))
    attempt(stage + ' chroot', lambda: os.chroot('/empty'))
    attempt(stage + ' kill', lambda: os.kill(int(sys.argv[-2]), 0))
    if stage == 'bare':
        seen['filter'] = seccomp.install()
attempt('fork', os.fork)
attempt('exec', lambda: os.execv(sys.executable, [sys.executable, '--version']))
attempt('ptrace', lambda: libc.ptrace(0, 0, 0, 0))
threading.Thread(target=lambda: None).start()
seen['core'] = resource.getrlimit(resource.RLIMIT_CORE)[0]
seen['files'] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
jobs.send(json.dumps(seen).encode())
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, object]:
    """Return what a probe inside a worker's confinement got."""
    settings = WorkerSettings(device="cpu")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    with ours, theirs, socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        abstract.bind(f"\0remora-test-{port}")
        abstract.listen()
        argv = launcher.worker_argv(settings, launcher.runtime(), [str(theirs.fileno()), "0", "64", "16"], None)
        argv[argv.index("-c") + 1] = PROBE
        argv += [str(os.getpid()), str(port)]
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        data = ours.recv(65536)
        process.wait(20)
    found: dict[str, object] = json.loads(data)
    return found


def test_a_worker_sees_no_file_of_the_host(seen: dict[str, object]) -> None:
    assert "home" not in str(seen["root"])
    assert (seen["cwd"], seen["cwd_entries"]) == ("/empty", [])
    for stage in ("bare", "filtered"):
        assert seen[f"{stage} hosts"] == "FileNotFoundError"


def test_a_worker_can_write_nowhere(seen: dict[str, object]) -> None:
    for stage in ("bare", "filtered"):
        for where in ("write", "write root", "write package"):
            assert seen[f"{stage} {where}"] == "OSError", where


def test_a_worker_has_no_network_and_no_socket(seen: dict[str, object]) -> None:
    assert seen["bare connect"] in ("OSError", "ConnectionRefusedError")
    assert seen["bare unix"] == "ConnectionRefusedError"
    assert seen["filtered connect"] == seen["filtered unix"] == "PermissionError"


def test_a_worker_sees_no_other_process(seen: dict[str, object]) -> None:
    assert seen["pid"] == 1
    assert seen["processes"] is False
    assert seen["bare kill"] == seen["filtered kill"] == "ProcessLookupError" or seen["filtered kill"] in (
        "PermissionError",
        "ProcessLookupError",
    )


def test_a_worker_gains_nothing_in_the_kernel(seen: dict[str, object]) -> None:
    for stage in ("bare", "filtered"):
        assert seen[f"{stage} mount"] == "-1"
        assert seen[f"{stage} namespace"] == "-1"
        assert seen[f"{stage} chroot"] == "PermissionError"
    assert seen["filter"] is True
    assert seen["fork"] == seen["exec"] == "PermissionError"
    assert seen["ptrace"] == "-1"


def test_a_worker_has_an_environment_and_limits_of_its_own(seen: dict[str, object]) -> None:
    assert set(launcher.environment()) <= set(seen["environment"])  # type: ignore[call-overload]  # JSON
    assert not {"HOME", "USER", "PATH", "PYTHONPATH"} & set(seen["environment"])  # type: ignore[call-overload]
    assert (seen["core"], seen["files"]) == (0, 64)


AGENT = """
import sys
from remora.reactor import Reactor
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings
reactor = Reactor()
pool = WorkerPool(reactor, WorkerSettings(device="cpu", standby=2, confinement=sys.argv[1]))
while not all(spare.ready for spare in pool._spares):
    reactor.run_once(1)
print(*(worker.pid for worker in pool.workers()), flush=True)
reactor.run()
"""


@pytest.mark.parametrize("confinement", ["bubblewrap", "none"])
def test_no_worker_outlives_an_agent_that_is_killed(confinement: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-c", AGENT, confinement]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as agent:
        assert agent.stdout is not None
        workers = [int(pid) for pid in agent.stdout.readline().split()]
        assert len(workers) == 2
        family = [psutil.Process(pid) for pid in {*workers, *(p.pid for p in psutil.Process(agent.pid).children(True))}]
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        end_s = time.monotonic() + 10
        _gone, alive = psutil.wait_procs(family, timeout=end_s - time.monotonic())
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay_ms", range(8))
def test_a_worker_killed_while_it_starts_leaves_no_process(delay_ms: int) -> None:
    reactor = Reactor()
    pool = WorkerPool(reactor, WorkerSettings(device="cpu", standby=3, open_files=201))
    end_s = time.monotonic() + delay_ms / 1000
    while time.monotonic() < end_s:
        reactor.run_once(0)
    pool.close()
    reactor.close()
    end_s = time.monotonic() + 5
    while _orphans("201") and time.monotonic() < end_s:
        os.sched_yield()
    assert _orphans("201") == set()


def test_what_an_agent_left_that_was_killed_while_it_started_workers_is_swept(tmp_path: Path) -> None:
    settings = WorkerSettings(device="cpu")
    for number in range(24):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, (tmp_path / "stderr").open("wb") as stderr:
            numbers = [str(theirs.fileno())] * 2 + ["202", "64", "1", "1", "1"]
            outer = launcher.launch(settings, numbers, [theirs.fileno()], stderr.fileno(), None)
            end_s = time.monotonic() + number / 4000  # hits the window in which its child is lost, now and then
            while time.monotonic() < end_s:
                os.sched_yield()
            outer.kill()
            outer.wait()
    launcher.sweep()
    end_s = time.monotonic() + 5
    while _orphans("202") and time.monotonic() < end_s:
        os.sched_yield()
    assert _orphans("202") == set()


def _orphans(mark: str) -> set[int]:
    """Return workers that lost bubblewrap; `mark` is an argument that tells them from those of other tests."""
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid", "status"]):
        info = process.info
        command = info["cmdline"] or []
        alone = info["ppid"] in (0, 1) and info["status"] != psutil.STATUS_ZOMBIE
        if alone and mark in command and any("remora.workers.main" in word for word in command):
            found.add(process.pid)
    return found
