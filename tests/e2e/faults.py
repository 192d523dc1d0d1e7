"""Breaks a node agent in one way at a time, many times, while tenants send requests: issue line 5 as a program.

    python tests/e2e/faults.py 100 [--only shared-worker --only full-disk ...] [--json FILE]

Four tenants send requests with known answers all the while, two to a catalogue model and two to models of their own.
Each round of a fault has to do what it says below, and in the end every request has exactly one answer, the right one.
Exit status 0 if all rounds held and no request was lost, answered twice or answered wrongly.

    shared-worker   SIGKILL of the worker that all tenants share; everything is answered, at most one retry each
    tenant-worker   SIGKILL of one tenant's worker, with its own model in it
    agent           SIGKILL of the agent; sessions resume, nothing is uploaded again, the first answer within 2 s
    full-disk       uploads are refused with the reason, what is there goes on, and uploads work when there is space
    corrupted       a stored model and a stored library are damaged: found by digest, not run, sent again
    hang            a library that does not return ends at its deadline, by SIGKILL
    memory          a library that allocates without bound meets its own bound
    forks           a library that forks and starts threads without bound meets its own bounds
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agent_process import AgentProcess, Guest
from c_library import CLibrary, compile_library
from load import LoadClient
from microvms import wait_until
from remora import paths
from remora.errors import DataLossError, RemoraError, ResourceExhaustedError
from remora.wire import control_v1, remora_v1, vaccel
from remora.wire.ttrpc.sync import Client
from remora.wire.vaccel_enums import ArgType, OpType

DISK_BYTES = 64 << 20
#: How often a disk is filled again before an upload must be refused.
_FILLS = 10
DEADLINE_S = 0.2
MEMORY_BYTES = 2400 << 20
CONFIG = f"""
[limits]
lease_s = 120

[workers]
threads = 2
stop_grace_s = 0.1
tenant_memory_bytes = {MEMORY_BYTES}
backoff_most_s = 0.5

[[label]]
match = {{ exec = "yes" }}
exec = true
"""
LIBRARY = """
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
F(twice) { int32_t n; memcpy(&n, r[0].buf, 4); n *= 2; memcpy(w[0].buf, &n, 4); return 0; }
F(leave) { _exit(0); }
F(hang) { for (;;) pause(); }
F(spin) { for (volatile int i = 0;; i++); }
F(memory) { for (;;) { char *p = malloc(16 << 20); if (!p) return ENOMEM; memset(p, 1, 16 << 20); } }
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static void *stay(void *x) { pthread_mutex_lock(&gate); pthread_mutex_unlock(&gate); return x; }
F(forks) { int32_t forks = 0, threads = 0; pthread_t t[4096]; pthread_attr_t a; pid_t pid;
  while (forks < 4096 && (pid = fork()) >= 0) { if (!pid) for (;;) pause(); forks++; }
  pthread_attr_init(&a); pthread_attr_setstacksize(&a, 65536); pthread_mutex_lock(&gate);
  while (threads < 4096 && !pthread_create(&t[threads], &a, stay, 0)) threads++;
  pthread_mutex_unlock(&gate); for (int i = 0; i < threads; i++) pthread_join(t[i], 0);
  ((int32_t *)w[0].buf)[0] = forks; ((int32_t *)w[0].buf)[1] = threads; return 0; }
"""


class Caller:
    """A tenant that may run libraries: a vAccel session and one resource."""

    def __init__(self, path: Path, library: CLibrary) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(path))
        self._client = Client(sock)
        created = self._call("CreateSession", vaccel.SessionCreateRequest(), vaccel.SessionCreateResponse)
        self._session = created.session_id
        self.register(library)

    def register(self, library: CLibrary) -> None:
        data = library.data
        blob = vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER, name="library", data=data, size=len(data))
        request = vaccel.ResourceRegisterRequest(session_id=self._session, blobs=[blob])
        self.resource = self._call("RegisterResource", request, vaccel.ResourceRegisterResponse).resource_id

    def run(self, symbol: str, read: bytes = b"", room: int = 4, timeout_s: float = 30.0) -> bytes:
        args = [
            _arg(bytes([OpType.EXEC_WITH_RESOURCE]), ArgType.UINT8),
            _arg(struct.pack("<q", self.resource), ArgType.INT64),
            _arg(symbol.encode() + b"\0", ArgType.STRING),
        ]
        if read:
            args.append(_arg(read, ArgType.RAW))
        request = vaccel.GenopRequest(
            session_id=self._session, read_args=args, write_args=[_arg(bytes(room), ArgType.RAW)]
        )
        answer = self._call("Genop", request, vaccel.GenopResponse, timeout_s)
        return bytes(answer.write_args[0].buf)

    def check(self) -> None:
        """The library computes."""
        number = random.randrange(1 << 30)
        assert self.run("twice", struct.pack("<i", number)) == struct.pack("<i", 2 * number), "a wrong answer"

    def close(self) -> None:
        """End the session, so that its resources make room for those of the next one."""
        with contextlib.suppress(RemoraError, OSError):
            self._call("DestroySession", vaccel.SessionDestroyRequest(session_id=self._session), vaccel.Empty)
        self._client.close()

    def _call(self, method: str, request: Any, answer: Any, timeout_s: float = 30.0) -> Any:
        return self._client.call(vaccel.SYNC_SERVICE, method, request, answer, timeout_s=timeout_s)


def _arg(data: bytes, kind: int) -> vaccel.GenopArg:
    return vaccel.GenopArg(buf=data, size=len(data), arg_type=kind)


def variant(model: bytes, text: str) -> bytes:
    """Return the same ONNX model with other bytes: a doc_string (field 6 of ModelProto) behind it."""
    note = text.encode()
    return model + b"\x32" + bytes([len(note)]) + note


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Faults:
    """An agent with its load, and one method for each fault."""

    def __init__(self, directory: Path, library: CLibrary, restart_s: float) -> None:
        models = paths.state_dir() / "models"
        self.identity = (models / "identity" / "model.onnx").read_bytes()
        self.library = library
        self.agent = AgentProcess(directory, config=CONFIG, models=models)
        self.agent.state = directory / "disk" / "state"
        self.figures: dict[str, list[float]] = {}
        self._places: dict[str, Path] = {}
        self.clients: list[LoadClient] = []
        self.restart_s = restart_s

    def start(self) -> None:
        self.agent.start()
        for name in ("shared-1", "shared-2", "own-1", "own-2", "native", "exec"):
            self._places[name] = self.agent.attach(name, labels={"exec": "yes"} if name == "exec" else {})
        for name in ("shared-1", "shared-2"):
            self.clients.append(LoadClient(self._connector(name), "identity"))
        for name in ("own-1", "own-2"):
            model = variant(self.identity, name)
            self.clients.append(LoadClient(self._connector(name), digest_of(model), upload=model))
        for client in self.clients:
            client.start()
        self.await_answers()

    def _connector(self, name: str) -> Callable[[], socket.socket]:
        return lambda: self.agent.connect(self._places[name])

    def await_answers(self) -> None:
        """Wait until each client has an answer that came after now."""
        now_s = time.monotonic()
        for client in self.clients:
            wait_until(partial(_answered, client, now_s), "the load goes on", 30)
            assert client.failure is None, client.failure

    def workers(self) -> dict[str, control_v1.WorkerStatus]:
        status = self.agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
        return {worker.domain: worker for worker in status.workers if worker.domain}

    def note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def caller(self) -> Any:
        made = Caller(self._places["exec"], self.library)
        try:
            yield made
        finally:
            made.close()

    # -- the faults ---------------------------------------------------------------------------------------------------

    def shared_worker(self) -> None:
        self._kill_worker("shared")

    def tenant_worker(self) -> None:
        self._kill_worker("sandbox:own-1")

    def _kill_worker(self, domain: str) -> None:
        pid = self.workers()[domain].pid
        began_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: domain in (now := self.workers()) and now[domain].pid != pid, "a new worker", 30)
        self.await_answers()
        self.note(f"all tenants answered again after the death of a worker of {domain}, s", time.monotonic() - began_s)

    def kill_agent(self) -> None:
        stored = self._stored()
        fresh = sum(client.tally.fresh for client in self.clients)
        self.agent.kill()
        began_s = time.monotonic()
        self.agent.start()
        for client in self.clients:
            wait_until(partial(_came_back, client, began_s), "an answer after the restart", 30)
        answered_s = sorted(client.first_answer_s - began_s for client in self.clients)
        first_s = answered_s[0]
        self.note("first answer after the start of a new agent, s", first_s)
        self.note("first answer to the last of the tenants, s", answered_s[-1])
        assert first_s < self.restart_s, f"the first answer took {first_s:.2f} s"
        assert sum(client.tally.fresh for client in self.clients) == fresh, "a session was not resumed"
        assert self._stored() == stored, "a resource was sent again"

    def _stored(self) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (self.agent.state / "resources").glob("*/*")}

    def full_disk(self) -> None:
        data = os.urandom(1_000_000)
        junk = self.agent.state.parent / "junk"
        with Guest(self.agent.connect(self._places["native"])) as guest:
            for _ in range(_FILLS):
                _fill(junk)
                if self._upload_is_refused(guest, data):
                    break
                data = os.urandom(len(data))  # the store had made room by removing what nobody uses: fill that, too
            else:
                raise AssertionError("uploads to a full disk are acknowledged")
            self.await_answers()
            junk.unlink()
            assert guest.upload(digest_of(data), data).complete
            guest.call("Close", remora_v1.Empty(), remora_v1.Empty)

    @staticmethod
    def _upload_is_refused(guest: Guest, data: bytes) -> bool:
        try:
            return not guest.upload(digest_of(data), data).complete
        except ResourceExhaustedError as error:
            if "disk is full" not in str(error):
                raise
            return True

    def corrupted(self) -> None:
        model = variant(self.identity, f"round {random.random()}")
        with Guest(self.agent.connect(self._places["native"])) as guest:
            digest = digest_of(model)
            guest.upload(digest, model)
            _damage(self._file(digest))
            _refused(lambda: guest.load(digest), (15,), "damaged")
            assert not guest.stat(digest).complete, "a damaged model counts as stored"
            guest.upload(digest, model)
            guest.load(digest)
            assert struct.unpack("<f", guest.infer(digest, 3.5).outputs[0].data) == (3.5,)
            # Once more, while it is loaded: the next worker must not load what has changed.
            _damage(self._file(digest))
            os.kill(self.workers()["sandbox:native"].pid, signal.SIGKILL)
            # It may still be answered by the worker that is dying, and only by that one; then it is asked for again.
            _refused(lambda: self._use(guest, digest), (5, 15), "")
            self._send_again(guest, digest, model)
            assert struct.unpack("<f", guest.infer(digest, 5.5).outputs[0].data) == (5.5,)
            guest.call("Close", remora_v1.Empty(), remora_v1.Empty)
        self._corrupted_library()

    @staticmethod
    def _send_again(guest: Guest, digest: str, model: bytes) -> None:
        """What a client does: load, and send the bytes where the agent says that its own are damaged."""
        guest.upload(digest, model)
        try:
            guest.load(digest)
        except DataLossError:
            guest.upload(digest, model)
            guest.load(digest)

    @staticmethod
    def _use(guest: Guest, digest: str) -> None:
        end_s = time.monotonic() + 20
        while time.monotonic() < end_s:
            _same(struct.unpack("<f", guest.infer(digest, 4.5).outputs[0].data), (4.5,))

    def _corrupted_library(self) -> None:
        data = self.library.data + os.urandom(8)  # behind the ELF's sections: another digest, the same code
        fresh = self.library.path.with_name("fresh.so")
        fresh.write_bytes(data)
        library = CLibrary(fresh)
        with self.caller() as caller:
            caller.register(library)
            _damage(self._file(library.digest))
            _refused(lambda: caller.run("twice", bytes(4)), (13,), "damaged")
            caller.register(library)
            caller.check()

    def _file(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self.agent.state / "resources" / name[:2] / name

    def hang(self) -> None:
        with self.caller() as caller:
            caller.check()
            for symbol in ("hang", "spin"):
                began_s = time.monotonic()
                _refused(partial(caller.run, symbol, timeout_s=DEADLINE_S), (4,), "")
                late_s = time.monotonic() - began_s - DEADLINE_S
                self.note("a library that hangs: answered after the deadline, s", late_s)
                caller.check()
                self.note(
                    "a library that hangs: the next call is answered after, s", time.monotonic() - began_s - DEADLINE_S
                )
        self.await_answers()

    def memory(self) -> None:
        with self.caller() as caller:
            caller.check()
            began_s = time.monotonic()
            # malloc gives nothing more (EPROTO, "returned 12"), or the kernel ends the worker (ABORTED).
            _refused(lambda: caller.run("memory"), (10, 13), "")
            self.note("a library that allocates without bound: answered after, s", time.monotonic() - began_s)
            caller.check()
            _refused(lambda: caller.run("leave"), (10,), "status 0")  # the next round starts with an empty process
        self.await_answers()

    def forks(self) -> None:
        with self.caller() as caller:
            forks, threads = struct.unpack("<ii", caller.run("forks", room=8))
            assert forks == 0, f"a library started {forks} processes"
            assert threads <= 64, f"a library started {threads} threads"
            self.note("a library that starts threads without bound: threads", threads)
            caller.check()
        self.await_answers()

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> list[str]:
        """Stop the load; return what was wrong with its answers."""
        problems = []
        for client in self.clients:
            client.finish()
            tally = client.tally
            found = {"lost": client.lost, "twice": tally.twice, "wrong": tally.wrong, **tally.errors}
            if client.failure is not None:
                found[repr(client.failure)] = 1
            problems += [f"{count} requests: {name}" for name, count in found.items() if count]
        if "internal error" in self.agent.log:
            problems.append(f"the agent had a fault of its own: see {self.agent.log_path}")
        status = self.agent.stop()
        if status:
            problems.append(f"the agent ended with {status}")
        return problems


def _fill(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, bytes(65536))
    except OSError:
        pass  # now it is full
    finally:
        os.close(fd)


def _damage(path: Path) -> None:
    """Change one bit in the middle, as a failing disk does."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def _refused(call: Callable[[], object], codes: Sequence[int], says: str) -> None:
    try:
        call()
    except RemoraError as error:
        if error.code not in codes or says not in str(error):
            raise AssertionError(f"it was refused with {error.code}: {error}") from error
    else:
        raise AssertionError("it was not refused")


def _same(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"the answer was {found}, not {expected}")


def _answered(client: LoadClient, since_s: float) -> bool:
    return client.last_answer_s > since_s or client.failure is not None


def _came_back(client: LoadClient, since_s: float) -> bool:
    """True if a connection made after that moment has had an answer."""
    return client.first_answer_s > since_s or client.failure is not None


FAULTS: dict[str, Callable[[Faults], None]] = {
    "shared-worker": Faults.shared_worker,
    "tenant-worker": Faults.tenant_worker,
    "agent": Faults.kill_agent,
    "full-disk": Faults.full_disk,
    "corrupted": Faults.corrupted,
    "hang": Faults.hang,
    "memory": Faults.memory,
    "forks": Faults.forks,
}


@contextlib.contextmanager
def small_disk(directory: Path) -> Any:
    """A file system of a few MB for the agent's state.

    Raises:
        PermissionError: mounting needs root.
    """
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        raise PermissionError(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def run(
    names: Sequence[str], count: int, report: Callable[[str], None] = print, *, restart_s: float = 2.0
) -> dict[str, Any]:
    """Run rounds of the named faults; return what happened: failures, the load's tally, figures."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rf-") as place:
        directory = Path(place)
        library = compile_library(directory, "faults", LIBRARY, ["-pthread"])
        with small_disk(directory / "disk"):
            faults = Faults(directory, library, restart_s)
            try:
                faults.start()
                for name in names:
                    held, began_s = 0, time.monotonic()
                    for number in range(count):
                        try:
                            FAULTS[name](faults)
                            held += 1
                        except (AssertionError, RemoraError, OSError) as error:
                            failures.append(f"{name}, round {number + 1}: {type(error).__name__}: {error}")
                            report(f"FAILED {failures[-1]}")
                    report(f"{name:14} {held} of {count} rounds held, {time.monotonic() - began_s:.0f} s")
            finally:
                failures += faults.finish()
                if failures:
                    shutil.copy(faults.agent.log_path, Path(tempfile.gettempdir()) / "remora-faults-agent.log")
    return {
        "failures": failures,
        "load": [{name: _plain(value) for name, value in vars(client.tally).items()} for client in faults.clients],
        "figures": {name: summary(values) for name, values in faults.figures.items()},
    }


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"count": len(ordered), "median": round(ordered[len(ordered) // 2], 3), "most": round(ordered[-1], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=100, help="rounds of each fault")
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="this fault; may be repeated")
    parser.add_argument("--restart-s", type=float, default=2.0, help="bound on the first answer after a restart")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_signal: sys.exit(128 + signal.SIGTERM))  # and leave nothing mounted
    found = run(args.only or list(FAULTS), args.count, partial(print, flush=True), restart_s=args.restart_s)
    for tally in found["load"]:
        print({key: value for key, value in tally.items() if value})
    for name, values in found["figures"].items():
        print(f"{name}: median {values['median']}, most {values['most']} of {values['count']}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2))
    for failure in found["failures"]:
        print(f"FAILED {failure}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
