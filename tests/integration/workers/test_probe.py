"""What a hostile library gets from inside its worker: each attempt, against the table in docs/confinement.md."""

from __future__ import annotations

import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from c_library import CLibrary, compile_library
from library_rig import LibraryRig, library_rig, source_of
from remora.errors import AbortedError
from remora.workers.contract import ModelSpec

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "confinement.md"
MEMORY_BYTES = 1600 << 20
_ROOM = 16384


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> CLibrary:
    source = (HERE / "probe.c").read_text()
    assert DOCUMENT.is_file()
    options = ["-D_GNU_SOURCE", f'-DSECRET="{DOCUMENT}"', "-pthread"]
    return compile_library(tmp_path_factory.mktemp("c"), "probe", source, options)


@pytest.fixture(scope="module")
def rig(probe: CLibrary) -> Iterator[LibraryRig]:
    with library_rig(tenant_memory_bytes=MEMORY_BYTES, stop_grace_s=1.0) as made:
        assert isinstance(made.load(source_of(probe)), ModelSpec)
        yield made


@pytest.fixture(scope="module")
def got(rig: LibraryRig, probe: CLibrary) -> tuple[dict[str, str], dict[str, str]]:
    """What each attempt got when the library was called, and when it was loaded."""
    pid = struct.pack("<i", os.getpid())
    texts = rig.call(probe.digest, "probe", [pid], [bytes(_ROOM), bytes(_ROOM)], seconds=30)
    assert isinstance(texts, list), texts
    called, loaded = (dict(line.split() for line in text.rstrip(b"\0").decode().splitlines()) for text in texts)
    return called, loaded


def documented() -> tuple[dict[str, str], dict[str, str]]:
    """Return what the document says: (called, loaded) by the name of the attempt."""
    called, loaded = {}, {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"[A-Z0-9]+", cells[2]):
            for name in re.findall(r"`([^`]+)`", cells[1]):
                called[name], loaded[name] = cells[2], cells[3]
    return called, loaded


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the document's table is that of x86-64")
def test_each_attempt_gets_what_the_document_says(got: tuple[dict[str, str], dict[str, str]]) -> None:
    called, loaded = documented()
    assert called
    assert got[0] == called
    assert got[1] == loaded


def test_no_attempt_succeeds(got: tuple[dict[str, str], dict[str, str]]) -> None:
    for stage in got:
        assert len(stage) > 100
        assert [name for name, outcome in stage.items() if outcome == "done"] == []


def test_threads_end_at_the_bound(rig: LibraryRig, probe: CLibrary) -> None:
    if not any("pids" in text for text in rig.pool.confinement.values()) and os.geteuid() == 0:
        pytest.skip("root without a pids control group: Linux bounds no threads")
    counted = rig.call(probe.digest, "threads", [], [bytes(4)], seconds=30)
    assert isinstance(counted, list), counted
    assert 8 < struct.unpack("<i", counted[0])[0] <= 64


def test_memory_ends_at_the_bound_and_the_worker_goes_on(rig: LibraryRig, probe: CLibrary) -> None:
    outcome = rig.call(probe.digest, "memory", [], [bytes(8)], seconds=60)
    if isinstance(outcome, AbortedError):
        assert "memory" in str(outcome)  # the control group was reached before the address space
        return
    assert isinstance(outcome, list), outcome
    assert struct.unpack("<q", outcome[0])[0] << 20 < MEMORY_BYTES


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has this entry")
def test_the_32_bit_entry_to_the_kernel_ends_the_worker(rig: LibraryRig, probe: CLibrary) -> None:
    outcome = rig.call(probe.digest, "old_entry", seconds=30)
    assert type(outcome) is AbortedError
    assert "SIGSYS" in str(outcome) or "returned 1" in str(outcome)
