"""A disk that is full is an answer that says so; nothing that was acknowledged is lost, and it goes on afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, running_agent
from remora.errors import RemoraError, ResourceExhaustedError
from remora.wire import remora_v1

DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of its own, of a few MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def upload(guest: Guest, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    for offset in range(0, len(data), 200_000):
        request = remora_v1.PutResourceRequest(
            digest=digest, offset=offset, total_bytes=len(data), data=data[offset : offset + 200_000]
        )
        answer = guest.call("PutResource", request, remora_v1.PutResourceResponse)
    assert answer.complete
    return digest


def fill(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, bytes(4096))
    except OSError:
        pass  # now it is full
    finally:
        os.close(fd)


def test_a_full_disk_refuses_uploads_and_sessions_and_recovers(small_disk: Path, models: Path, tmp_path: Path) -> None:
    with running_agent(small_disk, models=models) as agent, Guest(agent.connect()) as guest:
        kept = upload(guest, os.urandom(1_000_000))
        token = guest.token
        junk = small_disk / "junk"
        fill(junk)
        with pytest.raises(ResourceExhaustedError, match=r"disk is full.*operator"):
            upload(guest, os.urandom(500_000))
        assert not [path for path in (agent.state / "partial").glob("*/*") if not path.stat().st_size]
        assert guest.stat(kept).complete
        guest.infer("identity")
        refused = 0
        for _ in range(200):  # the journal's own file has room for some
            try:
                Guest(agent.connect()).close()
            except ResourceExhaustedError:
                refused += 1
                break
            except RemoraError as error:
                pytest.fail(f"another error than that of a full disk: {error!r}")
        assert refused
        junk.unlink()
        upload(guest, os.urandom(500_000))
        Guest(agent.connect()).close()
        agent.kill()
        agent.start()
        with Guest(agent.connect(), token) as again:
            assert again.hello.resumed
            assert again.stat(kept).complete


def test_an_agent_on_a_full_disk_says_so(small_disk: Path, models: Path) -> None:
    agent = AgentProcess(small_disk, models=models)
    fill(small_disk / "junk")
    result = subprocess.run(agent.command(), capture_output=True, text=True, check=False, env=agent.environment)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1, result.stderr
    assert "full" in result.stderr or "No space" in result.stderr
