"""Exec and exec_with_resource: what policy allows, what a library gets and gives, and how its failures look."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_process import AgentProcess, running_agent, wait_until
from c_library import CLibrary, compile_library
from remora.vaccel import Arg, ArgType, FFIError, Resource, ResourceType, Session, config, link
from remora.wire import vaccel
from vaccel_google import GoogleClient, RemoteError

SOURCE = """
#include <unistd.h>
F(scale) { float f, *x = w[0].buf; memcpy(&f, r[0].buf, 4);
  for (size_t i = 0; i < w[0].size / 4; i++) x[i] = f * ((float *)r[1].buf)[i]; return 0; }
F(types) { for (size_t i = 0; i < nr; i++) ((int32_t *)w[0].buf)[i] = r[i].type;
  ((int32_t *)w[0].buf)[nr] = r[nr - 1].custom_type_id; return 0; }
F(half) { w[0].size /= 2; memset(w[0].buf, 'x', w[0].size); return 0; }
F(fails) { return 3; }
F(longer) { w[0].size = 1 << 20; return 0; }
F(crashes) { *(volatile int *)8 = 1; return 0; }
F(sleeps) { for (;;) pause(); }
static int calls; F(counts) { *(int32_t *)w[0].buf = ++calls; return 0; }
"""
RAW, INT32, INT64, UINT8, FLOAT32_ARRAY, STRING, CUSTOM = 0, 5, 7, 9, 18, 27, 29
EXEC, EXEC_WITH_RESOURCE = 1, 2
POLICY = """
[limits]
request_timeout_s = 20

[workers]
stop_grace_s = 0.1
libraries = 2

[[label]]
match = {{ exec = "yes" }}
exec = true

[[label]]
match = {{ exec = "some" }}
exec = true
libraries = ["{allowed}"]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CLibrary:
    return compile_library(tmp_path_factory.mktemp("c"), "test", SOURCE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> CLibrary:
    return compile_library(tmp_path_factory.mktemp("c"), "other", "F(f) { *(char *)w[0].buf = 42; return 0; }")


@pytest.fixture(scope="module")
def allowing(tmp_path_factory: pytest.TempPathFactory, library: CLibrary) -> Iterator[AgentProcess]:
    policy = POLICY.format(allowed=library.digest)
    with running_agent(tmp_path_factory.mktemp("x"), config=policy) as agent:
        yield agent


class Tenant:
    """A sandbox with a connection, a session and its libraries."""

    def __init__(self, agent: AgentProcess, name: str, **labels: str) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(str(agent.attach(name, labels=labels)))
        self.client = GoogleClient(sock, vaccel.SYNC_SERVICE)
        self.session = int(self.client.call("CreateSession", flags=1).session_id)

    def register(self, *libraries: CLibrary, kind: int = 0) -> int:
        blobs = [
            self.client.message("resource.Blob", type_=1, name=made.path.name, data=made.data, size=len(made.data))
            for made in libraries
        ]
        answer = self.client.call("RegisterResource", session_id=self.session, blobs=blobs, resource_type=kind)
        return int(answer.resource_id)

    def call(self, resource: int | str, symbol: str, read: list[Any], write: list[Any]) -> list[bytes]:
        if isinstance(resource, int):
            opcode, first = EXEC_WITH_RESOURCE, self.client.arg(struct.pack("<q", resource), INT64)
        else:
            opcode, first = EXEC, self.client.arg(resource.encode() + b"\0", STRING)
        head = [self.client.arg(bytes([opcode]), UINT8), first, self.client.arg(symbol.encode() + b"\0", STRING)]
        answer = self.client.call("Genop", session_id=self.session, read_args=[*head, *read], write_args=write)
        assert [arg.size for arg in answer.write_args] == [len(arg.buf) for arg in answer.write_args]
        return [arg.buf for arg in answer.write_args]

    def refused(self, resource: int | str, symbol: str, code: int, number: int, says: str) -> None:
        with pytest.raises(RemoteError, match=says) as caught:
            self.call(resource, symbol, [], [self.client.arg(bytes(8), RAW)])
        assert (caught.value.code, caught.value.errno) == (code, number)

    def count(self, resource: int | str) -> int:
        return int(struct.unpack("<i", self.call(resource, "counts", [], [self.client.arg(bytes(4), INT32)])[0])[0])

    def __enter__(self) -> Tenant:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.client.close()


@pytest.fixture
def alice(allowing: AgentProcess, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    with Tenant(allowing, f"alice-{abs(hash(request.node.name))}", exec="yes") as tenant:
        yield tenant


def test_a_function_of_an_uploaded_library_runs(alice: Tenant, library: CLibrary) -> None:
    resource = alice.register(library)
    client = alice.client
    values = np.arange(100_000, dtype="<f4")
    read = [client.arg(struct.pack("<f", 1.5), 17), client.arg(values.tobytes(), FLOAT32_ARRAY)]
    (out,) = alice.call(resource, "scale", read, [client.arg(bytes(400_000), FLOAT32_ARRAY)])
    np.testing.assert_array_equal(np.frombuffer(out, "<f4"), values * np.float32(1.5))
    typed = [client.arg(b"abc\0", STRING), client.arg(b"x", CUSTOM, custom_type_id=77)]
    assert struct.unpack("<iii", alice.call(resource, "types", typed, [client.arg(bytes(12), RAW)])[0]) == (27, 29, 77)
    assert alice.call(resource, "half", [], [client.arg(bytes(8), RAW)]) == [b"xxxx"]


def test_exec_takes_the_digest_of_an_own_library_and_no_path(alice: Tenant, library: CLibrary) -> None:
    alice.register(library)
    assert alice.count(library.digest) == 1
    alice.refused("/lib/x86_64-linux-gnu/libc.so.6", "abort", 7, errno.EPERM, "no library of its host")
    alice.refused(str(library.path), "counts", 7, errno.EPERM, "no library of its host")
    alice.refused(f"sha256:{'0' * 64}", "counts", 5, errno.ENOENT, "no resource")


@pytest.mark.parametrize(
    ("symbol", "number", "says"),
    [
        ("missing", errno.ENOSYS, "no function .*missing"),
        ("fails", errno.EPROTO, "fails returned 3"),
        ("longer", errno.EPROTO, "has room for 8"),
    ],
)
def test_a_failed_call_has_the_errno_of_vaccels_plugin(
    alice: Tenant, library: CLibrary, symbol: str, number: int, says: str
) -> None:
    alice.refused(alice.register(library), symbol, 13, number, says)


def test_a_crash_is_one_failed_call(alice: Tenant, library: CLibrary, other: CLibrary) -> None:
    crashing, steady = alice.register(library), alice.register(other)
    write = [alice.client.arg(b"0", RAW)]
    assert alice.call(steady, "f", [], write) == [b"*"]
    for _ in range(3):
        alice.refused(crashing, "crashes", 10, errno.EPROTO, "SIGSEGV")
        assert alice.count(crashing) == 1
    assert alice.call(steady, "f", [], write) == [b"*"]


def test_what_is_no_library_cannot_be_loaded(alice: Tenant, tmp_path: Path, library: CLibrary) -> None:
    (tmp_path / "text.so").write_bytes(b"no library")
    alice.refused(alice.register(CLibrary(tmp_path / "text.so")), "f", 13, errno.EINVAL, "cannot be loaded")
    alice.refused(alice.register(library, kind=2), "f", 13, errno.EINVAL, "is not a library")
    with pytest.raises(RemoteError, match="Unknown resource 12345"):
        alice.call(12345, "f", [], [])


@pytest.mark.parametrize(
    ("first", "second"),
    [((b"1234567", INT64), (b"f\0", STRING)), ((b"\1", UINT8), (b"f\0", STRING)), (None, (b"f", STRING))],
)
def test_arguments_of_another_kind_are_invalid(
    alice: Tenant, library: CLibrary, first: tuple[bytes, int] | None, second: tuple[bytes, int]
) -> None:
    client = alice.client
    number = first or (struct.pack("<q", alice.register(library)), INT64)
    read = [client.arg(bytes([EXEC_WITH_RESOURCE]), UINT8), client.arg(*number), client.arg(*second)]
    for sent in (read, read[:2], read[:1]):
        with pytest.raises(RemoteError) as caught:
            client.call("Genop", session_id=alice.session, read_args=sent)
        assert (caught.value.code, caught.value.errno) == (13, errno.EINVAL)


def test_policy_allows_libraries_by_digest(allowing: AgentProcess, library: CLibrary, other: CLibrary) -> None:
    with Tenant(allowing, "some", exec="some") as some:
        assert some.count(some.register(library)) == 1
        some.refused(some.register(other), "f", 7, errno.EPERM, r"library .*sha256:.*\[\[label\]\] 2 libraries")
        some.refused(some.register(other, library), "counts", 7, errno.EPERM, r"\[\[label\]\] 2 libraries")
    with Tenant(allowing, "none") as none:
        none.refused(none.register(library), "counts", 7, errno.EPERM, r"exec is off.*exec = false")


def test_a_library_is_unknown_to_other_tenants_and_sessions(
    allowing: AgentProcess, alice: Tenant, library: CLibrary
) -> None:
    resource = alice.register(library)
    assert alice.count(resource) == 1
    with Tenant(allowing, "bob", exec="yes") as bob:
        with pytest.raises(RemoteError, match=f"Unknown resource {resource}"):
            bob.count(resource)
        bob.refused(library.digest, "counts", 5, errno.ENOENT, "no resource")
        assert bob.count(bob.register(library)) == 1  # a worker of its own: it counts from the start
    mine, alice.session = alice.session, int(alice.client.call("CreateSession", flags=1).session_id)
    alice.refused(resource, "counts", 7, errno.EPERM, "not registered")
    alice.session = mine
    assert alice.count(resource) == 2


def test_a_tenant_has_few_libraries_loaded_and_the_oldest_makes_room(
    allowing: AgentProcess, alice: Tenant, library: CLibrary, other: CLibrary, tmp_path: Path
) -> None:
    third = compile_library(tmp_path, "third", "F(f) { *(char *)w[0].buf = 43; return 0; }")
    first, second, last = alice.register(library), alice.register(other), alice.register(third)
    write = [alice.client.arg(b"0", RAW)]
    assert alice.count(first) == 1
    assert alice.call(second, "f", [], write) == [b"*"]
    assert alice.count(first) == 2
    assert alice.call(last, "f", [], write) == [b"+"]
    assert alice.count(first) == 3
    assert alice.call(second, "f", [], write) == [b"*"]
    assert alice.call(last, "f", [], write) == [b"+"]
    assert alice.count(first) == 1  # it had to make room, and was loaded again


def test_a_damaged_library_is_not_run_and_can_be_sent_again(
    allowing: AgentProcess, alice: Tenant, tmp_path: Path
) -> None:
    made = compile_library(tmp_path, "fresh", f"F(f) {{ *(char *)w[0].buf = {ord('z')}; return 0; }}")
    resource = alice.register(made)
    (path,) = [path for path in (allowing.state / "resources").glob("*/*") if made.digest.endswith(path.name)]
    path.write_bytes(made.data[:-1] + b"!")
    alice.refused(resource, "f", 13, errno.EIO, "damaged")
    with pytest.raises(RemoteError, match="Unknown resource"):
        alice.call(resource, "f", [], [])
    assert alice.call(alice.register(made), "f", [], [alice.client.arg(b"0", RAW)]) == [b"z"]


@pytest.fixture
def attached(allowing: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point `remora.vaccel` at a sandbox that may run libraries."""
    monkeypatch.setenv("VACCEL_RPC_ADDRESS", f"unix://{allowing.attach('sdk', labels={'exec': 'yes'})}")
    link.close()
    yield
    config.cleanup()


@pytest.mark.usefixtures("attached")
def test_remora_vaccel_runs_a_library(library: CLibrary) -> None:
    with Session() as session:
        resource = Resource(library.path, ResourceType.LIB)
        resource.register(session)
        values, out = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
        assert session.exec_with_resource(resource, "scale", [2.0, values], [out]) is not None
        np.testing.assert_array_equal(out, 2 * values)
        assert session.exec(library.digest, "counts", None, [Arg(0, ArgType.INT32)]) == [1]
        with pytest.raises(FFIError) as caught:
            session.exec_with_resource(resource, "crashes")
        assert caught.value.code == errno.EPROTO


def test_a_call_that_does_not_return_ends_at_the_deadline_and_disturbs_nobody(
    allowing: AgentProcess, alice: Tenant, library: CLibrary
) -> None:
    resource = alice.register(library)
    assert alice.count(resource) == 1
    with Tenant(allowing, "patient", exec="yes") as patient:
        number = patient.register(library)
        assert patient.count(number) == 1
        first, symbol = patient.client.arg(struct.pack("<q", number), INT64), patient.client.arg(b"sleeps\0", STRING)
        head = [patient.client.arg(bytes([EXEC_WITH_RESOURCE]), UINT8), first, symbol]
        began_s = time.monotonic()
        with pytest.raises(RemoteError) as caught:
            patient.client.call("Genop", timeout_s=0.3, session_id=patient.session, read_args=head)
        assert caught.value.code == 4
        assert time.monotonic() - began_s < 5
        assert alice.count(resource) == 2
        assert patient.count(number) == 1  # a new worker


def test_no_worker_of_a_library_outlives_its_agent(tmp_path: Path, library: CLibrary) -> None:
    running = AgentProcess(tmp_path, config=POLICY.format(allowed="*"))
    running.start()
    with Tenant(running, "t", exec="yes") as tenant:
        tenant.count(tenant.register(library))
    running.kill()
    mark = str(tmp_path).encode()
    wait_until(lambda: not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(p)], "no process is left")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
