"""What operators may set about workers, and what follows from it."""

from __future__ import annotations

from remora.workers.settings import WorkerSettings, machine_memory_bytes


def test_the_catalogues_worker_leaves_memory_to_the_machine_unless_told_otherwise() -> None:
    assert WorkerSettings().shared_bound_bytes == machine_memory_bytes() // 4 * 3
    assert WorkerSettings(shared_memory_bytes=1 << 30).shared_bound_bytes == 1 << 30
