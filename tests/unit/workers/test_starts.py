"""Workers start in turn: as many at once as there is room for, the shared one first, a slow one holding up none."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest

from remora.reactor import Reactor
from remora.workers import starts as module
from remora.workers.process import WorkerProcess
from remora.workers.starts import Starts


class FakeProcess:
    """What `Starts` sees of a worker process."""

    def __init__(self) -> None:
        self.on_started: Any = None


class Turns:
    """Those who wait for a worker, by name, and the workers that they got in their turn."""

    def __init__(self, starts: Starts) -> None:
        self._starts = starts
        self.began: dict[str, FakeProcess] = {}

    def want(self, name: str, *, first: bool = False, needless: bool = False) -> None:
        if not self._starts.free:
            self._starts.wait(lambda: None if needless else self.want(name), first=first)
            return
        self.began[name] = FakeProcess()
        self._starts.began(cast("WorkerProcess", self.began[name]))


@pytest.fixture
def turns() -> Turns:
    return Turns(Starts(Reactor(), most=2))


def test_the_next_worker_starts_when_one_is_ready_or_dead(turns: Turns) -> None:
    for name in ("a", "b", "c", "d"):
        turns.want(name)
    assert list(turns.began) == ["a", "b"]
    turns.began["b"].on_started()
    assert list(turns.began) == ["a", "b", "c"]
    turns.began["b"].on_started()  # once more: it frees no second place
    assert list(turns.began) == ["a", "b", "c"]


def test_the_worker_that_all_share_goes_first(turns: Turns) -> None:
    for name in ("a", "b", "c"):
        turns.want(name)
    turns.want("shared", first=True)
    turns.began["a"].on_started()
    assert list(turns.began) == ["a", "b", "shared"]


def test_who_needs_no_worker_any_more_does_not_stop_those_behind(turns: Turns) -> None:
    for name in ("a", "b"):
        turns.want(name)
    turns.want("gone", needless=True)
    turns.want("d")
    turns.began["a"].on_started()
    assert list(turns.began) == ["a", "b", "d"]


def test_a_worker_that_takes_long_to_start_does_not_keep_the_next_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    reactor = Reactor()
    slow = Turns(Starts(reactor, most=1))
    slow.want("hangs")
    slow.want("next")
    while "next" not in slow.began:
        reactor.run_once(1.0)
    slow.began["hangs"].on_started()  # at last: it counts no more


def test_the_agent_starts_without_the_libraries_that_compute() -> None:
    """Each of them would take a tenth of a second from the first answer after a restart."""
    heavy = ("numpy", "onnx", "onnxruntime", "PIL", "ssl")
    code = f"import sys, remora.agent.server, remora.workers.pool; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
