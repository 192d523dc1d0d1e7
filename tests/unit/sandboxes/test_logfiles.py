"""A detached sandbox's output: all of it while it is small, the newest of it when it is not."""

from __future__ import annotations

import threading
from pathlib import Path

from remora.sandboxes.logfiles import LogWriter, read


def everything(directory: Path) -> bytes:
    return b"".join(read(directory, "stdout", is_live=lambda: False, wait=lambda: None))


def test_output_is_read_back(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "stdout")
    writer.write(b"one\n")
    writer.write(b"two\n")
    writer.close()
    assert everything(tmp_path) == b"one\ntwo\n"
    assert b"".join(read(tmp_path, "stderr", is_live=lambda: False, wait=lambda: None)) == b""


def test_the_newest_output_is_kept_within_the_bound(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "stdout", limit_bytes=1000)
    written = b""
    for number in range(1000):
        line = f"line {number}\n".encode()
        writer.write(line)
        written += line
    writer.close()
    kept = everything(tmp_path)
    assert written.endswith(kept)
    assert 1000 <= len(kept) <= 2 * 1000 + 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == len(kept)


def test_following_sees_what_comes_later_over_a_change_of_files_and_ends_with_the_sandbox(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "stdout", limit_bytes=50)
    writer.write(b"first\n")
    seen: list[bytes] = []
    live, turn = [True], threading.Semaphore(0)
    waiting = threading.Semaphore(0)

    def wait() -> None:
        waiting.release()
        assert turn.acquire(timeout=10)

    def follow() -> None:
        seen.extend(read(tmp_path, "stdout", is_live=lambda: live[0], wait=wait))

    thread = threading.Thread(target=follow)
    thread.start()
    expected = b"first\n"
    for number in range(12):
        assert waiting.acquire(timeout=10)
        line = b"line %d\n" % number * 3
        writer.write(line)
        expected += line
        turn.release()
    assert waiting.acquire(timeout=10)
    live[0] = False
    turn.release()
    thread.join(10)
    writer.close()
    assert b"".join(seen) == expected
