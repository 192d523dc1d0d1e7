"""A tenant's library in a worker of its own: what it computes, and how it ends when it misbehaves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from c_library import CLibrary, compile_library
from library_rig import LibraryRig, library_rig, source_of
from remora.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    RemoraError,
    UnimplementedError,
)
from remora.workers import cgroups
from remora.workers.contract import LIBRARY, ModelSource, ModelSpec

SOURCE = """
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
F(add) { int32_t a, b; memcpy(&a, r[0].buf, 4); memcpy(&b, r[1].buf, 4); a += b; memcpy(w[0].buf, &a, 4); return 0; }
F(count) { *(uint8_t *)w[0].buf = nr; *(uint8_t *)w[1].buf = nw; return 0; }
F(types) { ((int32_t *)w[0].buf)[0] = r[0].type; ((int32_t *)w[0].buf)[1] = r[0].custom_type_id; return 0; }
F(upper) { for (size_t i = 0; i < w[0].size; i++) ((char *)w[0].buf)[i] -= 32; return 0; }
F(shorter) { w[0].size = 3; memcpy(w[0].buf, "abc", 3); return 0; }
F(longer) { w[0].size += 1; return 0; }
F(replaces) { w[0].buf = malloc(8); return 0; }
F(fails) { return 7; }
F(crashes) { *(volatile int *)8 = 1; return 0; }
F(leaves) { _exit(3); }
F(aborts) { abort(); }
F(sleeps) { for (;;) pause(); }
F(spins) { for (volatile int i = 0;; i++); }
F(eats) { for (;;) { char *p = malloc(16 << 20); if (!p) return ENOMEM; memset(p, 1, 16 << 20); } }
static int calls; F(counts) { *(int32_t *)w[0].buf = ++calls; return 0; }
static void *thread(void *x) { return x; }
F(threads) { pthread_t t; int n = 0; while (n < 1000 && !pthread_create(&t, 0, thread, 0)) { pthread_join(t, 0); n++; }
  *(int32_t *)w[0].buf = n; return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CLibrary:
    return compile_library(tmp_path_factory.mktemp("c"), "test", SOURCE)


@pytest.fixture
def rig() -> Iterator[LibraryRig]:
    with library_rig() as made:
        yield made


def number(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def test_a_function_gets_its_arguments_and_writes_its_results(rig: LibraryRig, library: CLibrary) -> None:
    key = library.digest
    assert isinstance(rig.load(source_of(library)), ModelSpec)
    assert rig.call(key, "add", [number(40), number(2)], [bytes(4)]) == [number(42)]
    assert rig.call(key, "count", [b"x"] * 5, [b"y", b"z"]) == [b"\x05", b"\x02"]
    assert rig.call(key, "types", [b"x"], [bytes(8)], name="29:77") == [number(29) + number(77)]
    assert rig.call(key, "upper", [], [b"hello"]) == [b"HELLO"]
    assert rig.call(key, "shorter", [], [bytes(10)]) == [b"abc"]
    assert rig.call(key, "counts", [], [bytes(4)]) == [number(1)]
    assert rig.call(key, "counts", [], [bytes(4)]) == [number(2)]
    assert rig.call(key, "threads", [], [bytes(4)]) == [number(1000)]
    (info,) = rig.pool.workers()
    assert (info.backend, info.domain, info.models) == ("library", rig.domain, (key,))


@pytest.mark.parametrize(
    ("symbol", "error", "says"),
    [
        ("nothing", UnimplementedError, "no function 'nothing'"),
        ("fails", InternalError, "fails returned 7"),
        ("longer", InternalError, "wrote 5 bytes to write argument 0, which has room for 4"),
        ("replaces", InternalError, "replaced the buffer"),
    ],
)
def test_what_a_function_does_wrong_is_said_and_its_worker_lives(
    rig: LibraryRig, library: CLibrary, symbol: str, error: type[RemoraError], says: str
) -> None:
    rig.load(source_of(library))
    outcome = rig.call(library.digest, symbol, [], [bytes(4)])
    assert type(outcome) is error
    assert says in str(outcome)
    assert rig.call(library.digest, "counts", [], [bytes(4)]) == [number(1)]


@pytest.mark.parametrize(("symbol", "says"), [("crashes", "SIGSEGV"), ("leaves", "status 3"), ("aborts", "SIG")])
def test_a_crash_ends_one_worker_and_one_request(rig: LibraryRig, library: CLibrary, symbol: str, says: str) -> None:
    rig.load(source_of(library))
    outcome = rig.call(library.digest, symbol, [], [bytes(4)])
    assert type(outcome) is AbortedError
    assert says in str(outcome)
    assert "not run again" in str(outcome)
    assert rig.call(library.digest, "counts", [], [bytes(4)]) == [number(1)]


@pytest.mark.parametrize("symbol", ["sleeps", "spins"])
def test_a_function_that_does_not_return_ends_at_the_deadline(rig: LibraryRig, library: CLibrary, symbol: str) -> None:
    rig.load(source_of(library))
    began_s = time.monotonic()
    outcome = rig.call(library.digest, symbol, seconds=0.2)
    assert type(outcome) is DeadlineExceededError
    assert time.monotonic() - began_s < 2
    assert rig.call(library.digest, "counts", [], [bytes(4)]) == [number(1)]


def test_memory_ends_at_the_bound(library: CLibrary) -> None:
    with library_rig(tenant_memory_bytes=1600 << 20) as rig:
        rig.load(source_of(library))
        outcome = rig.call(library.digest, "eats")
        assert isinstance(outcome, InternalError | AbortedError)  # malloc fails, or the kernel ends the worker
        assert "returned 12" in str(outcome) or "memory" in str(outcome)
        assert rig.call(library.digest, "counts", [], [bytes(4)]) == [number(1)]


def test_what_a_library_needs_is_loaded_before_it(rig: LibraryRig, tmp_path: Path) -> None:
    needed = compile_library(tmp_path, "needed", "int answer(void) { return 42; }")
    user = compile_library(tmp_path, "user", "int answer(void); F(f) { *(char *)w[0].buf = answer(); return 0; }")
    refused = rig.load(source_of(user))
    assert type(refused) is InvalidArgumentError
    assert "undefined symbol: answer" in str(refused)
    rig.pool.release_domain(rig.domain)
    assert isinstance(rig.load(source_of(needed, user)), ModelSpec)
    assert rig.call(user.digest, "f", [], [b"0"]) == [b"*"]


def test_a_file_that_is_no_library_is_refused(rig: LibraryRig, tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"\x7fELF and nothing else")
    outcome = rig.load(source_of(CLibrary(tmp_path / "x.so")))
    assert type(outcome) is InvalidArgumentError
    assert "cannot be loaded" in str(outcome)
    assert str(tmp_path) not in str(outcome)


def test_bytes_with_another_digest_are_not_loaded(rig: LibraryRig, library: CLibrary) -> None:
    wrong = f"sha256:{'0' * 64}"
    outcome = rig.load(ModelSource(wrong, wrong, library.path, LIBRARY))
    assert type(outcome) is DataLossError


def test_a_constructor_that_hangs_or_crashes_is_given_up(tmp_path: Path) -> None:
    with library_rig(start_s=3.0) as rig:
        for name, code in (("hang", "for (;;) pause();"), ("crash", "*(volatile int *)8 = 1;")):
            made = compile_library(
                tmp_path, name, f"#include <unistd.h>\n__attribute__((constructor)) void f(void) {{ {code} }}"
            )
            outcome = rig.load(source_of(made))
            assert type(outcome) is AbortedError, outcome
            assert "while it loaded it" in str(outcome)
            rig.pool.release_domain(rig.domain)


def test_libraries_do_not_run_unconfined(library: CLibrary) -> None:
    with library_rig(confinement="none") as rig:
        assert type(rig.load(source_of(library))) is FailedPreconditionError


def test_a_worker_has_its_bounds_and_nothing_is_left_of_them(rig: LibraryRig, library: CLibrary) -> None:
    rig.load(source_of(library))
    (info,) = rig.pool.workers()
    groups = cgroups.own_directories(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    report = rig.pool.confinement["cgroups"]
    if report.startswith("none"):
        pytest.skip(f"no control groups: {report}")
    mine = [path for above in set(groups[1].values()) for path in above.glob(f"remora-{os.getpid()}-*/{info.id}-*")]
    assert mine
    pids = {int(pid) for path in mine for pid in (path / "cgroup.procs").read_text().split()}
    assert info.pid in pids
    for path in mine:
        if (path / "pids.max").exists():
            assert (path / "pids.max").read_text().strip() == "64"
        if (path / "memory.limit_in_bytes").exists():
            assert int((path / "memory.limit_in_bytes").read_text()) == 4096 << 20
    rig.pool.release_domain(rig.domain)
    rig.until(lambda: not any(path.exists() for path in mine))


def test_groups_of_a_dead_agent_are_swept(tmp_path: Path) -> None:
    version, directories = cgroups.own_directories(
        Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    )
    found = cgroups.detect()
    if isinstance(found, str):
        pytest.skip(f"no control groups: {found}")
    made = cgroups.Groups(version, {name: directories[name] for name in found.controllers}, "remora-999999999-1-0")
    for directory in set(directories.values()):
        (directory / "remora-999999999-1-0").mkdir(exist_ok=True)
    made.create("w1")
    assert found.sweep()
    assert not any((directory / "remora-999999999-1-0").exists() for directory in directories.values())
    found.close()
