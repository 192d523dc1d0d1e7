"""A guest whose root is the pod's author: whatever it answers, or does not, costs its own pod alone, and in bounds."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from remora.errors import (
    DeadlineExceededError,
    ProtocolError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
)
from remora.reactor import Reactor
from remora.sandboxes.guest import Guest
from remora.shim import exits, oom, stats
from remora.shim.pod import Pod
from remora.shim.streams import Streams
from remora.shim.task import Process, Task
from remora.vmm import channel
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1
from remora.wire.ttrpc.frames import HEADER, RESPONSE


class FakeGuest:
    """Answers the pod service by a function; a stand-in for a guest that Remora's own would never be."""

    def __init__(self, answer: Callable[[str, Any], Any]) -> None:
        self.asked: list[str] = []
        self._answer = answer

    def pod(self, method: str, request: Any, _timeout_s: float | None = None) -> Any:
        self.asked.append(method)
        return self._answer(method, request)

    @property
    def as_pod(self) -> Pod:
        return cast(Pod, SimpleNamespace(vm=self))


class Published:
    """Takes events as a containerd that is `waiting` events behind."""

    def __init__(self, waiting: int = 0) -> None:
        self.events: list[Any] = []
        self.waiting = waiting

    def publish(self, event: Any) -> None:
        self.events.append(event)

    def ooms(self) -> list[str]:
        return [event.container_id for event in self.events if isinstance(event, c.TaskOOM)]


def running(reactor: Reactor, name: str) -> Task:
    process = Process(name, "", Streams(reactor, "", "", "", terminal=False))
    process.status = c.RUNNING
    process.pid = 4711
    task = Task(name, "/nowhere", "container", process)
    task.in_guest = True
    return task


def run_until(reactor: Reactor, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        reactor.run_once(0.01)


def test_kills_are_told_once_for_the_pods_own_containers_and_for_nobody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oom, "INTERVAL_S", 0.01)
    reactor, published, answers = Reactor(), Published(), 0

    def answer(_method: str, request: v1.OomKillsRequest) -> v1.OomKillsResponse:
        nonlocal answers
        answers += 1
        if answers > 20:
            raise UnavailableError("the guest has ended")
        # A number that does not grow, the same count over and over, a container of another pod, and one twice.
        kills = [v1.OomKills(id=name, kills=3) for name in ("own", "foreign", "", "own")]
        return v1.OomKillsResponse(number=0, containers=kills)

    guest = FakeGuest(answer)
    tasks = {"own": running(reactor, "own"), "quiet": running(reactor, "quiet")}
    events = oom.OomEvents(reactor, cast(Any, published), guest.as_pod, tasks)
    events.watch()
    events.watch()
    run_until(reactor, lambda: answers > 20 and published.events)
    reactor.run_once(0)
    assert published.ooms() == ["own"]


def test_a_guest_that_never_stops_killing_is_asked_once_in_a_while_and_not_while_containerd_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oom, "INTERVAL_S", 0.05)
    reactor, published, kills = Reactor(), Published(), 0

    def answer(_method: str, request: v1.OomKillsRequest) -> v1.OomKillsResponse:
        nonlocal kills
        kills += 1
        if kills > 1000:
            raise UnavailableError("the guest has ended")
        return v1.OomKillsResponse(number=kills, containers=[v1.OomKills(id="own", kills=kills)])

    guest = FakeGuest(answer)
    oom.OomEvents(reactor, cast(Any, published), guest.as_pod, {"own": running(reactor, "own")}).watch()
    began_s = time.monotonic()
    run_until(reactor, lambda: len(published.events) >= 4)
    assert len(guest.asked) <= (time.monotonic() - began_s) / 0.05 + 2
    published.waiting = oom.MOST_WAITING + 1
    reactor.run_once(0.1)
    before = len(guest.asked)
    deadline_s = time.monotonic() + 0.3
    while time.monotonic() < deadline_s:
        reactor.run_once(0.05)
    assert len(guest.asked) <= before + 1
    kills = 1000
    published.waiting = 0
    run_until(reactor, lambda: not [one for one in threading.enumerate() if one.name == "oom"])


def exits_of(pod: Any, reactor: Reactor) -> exits.Exits:
    ooms = SimpleNamespace(tell=lambda _task, _kills: None)
    return exits.Exits(reactor, cast(Any, Published()), cast(Pod, pod), cast(Any, ooms))


def fake_pod(guest: Any, given_up: list[str]) -> Any:
    """A pod that notes why its microVM would be ended."""
    return SimpleNamespace(
        vm=SimpleNamespace(guest=guest),
        give_up=given_up.append,
        kill_timeout_s=0.05,
        bring_back=lambda _task: None,
    )


def test_a_process_that_goes_on_after_sigkill_is_the_end_of_its_microvm() -> None:
    reactor, given_up = Reactor(), list[str]()
    task = running(reactor, "own")
    watcher = exits_of(fake_pod(None, given_up), reactor)
    watcher.killed(task.process)
    run_until(reactor, lambda: given_up)
    assert "SIGKILL" in given_up[0]
    task.process.exit(137)
    watcher.killed(task.process)
    deadline_s = time.monotonic() + 0.2
    while time.monotonic() < deadline_s:
        reactor.run_once(0.05)
    assert len(given_up) == 1, "one that obeys is left alone"


@pytest.mark.parametrize("error", [UnavailableError("closed"), ProtocolError("a request of the server's")])
def test_a_guest_that_breaks_off_control_does_not_run_on_unseen(
    error: RemoraError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "_LOST_S", 0.01)
    reactor, given_up = Reactor(), list[str]()

    def wait(*_: Any, **_more: Any) -> Any:
        raise error

    task = running(reactor, "own")
    exits_of(fake_pod(SimpleNamespace(wait=wait), given_up), reactor).watch(task, task.process)
    run_until(reactor, lambda: given_up and task.process.exited)
    assert task.process.exit_status == 137


def test_answers_are_bounded_however_many_calls_wait_for_one(tmp_path: Path) -> None:
    """Each process that runs has a call that waits: a guest may answer all at once, with as much as it likes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / channel.SOCKET_NAME))
    listener.listen()
    calls = 40

    def serve() -> None:
        guest, _ = listener.accept()
        # The host hangs up in the middle of the last answer.
        with guest, guest.makefile("rb") as asked, contextlib.suppress(OSError):
            asked.readline()
            guest.sendall(b"OK 1\n")
            for _ in range(calls):
                size, stream, _kind, _flags = HEADER.unpack(asked.read(10))
                asked.read(size)
                # 4 MiB, the most that a frame of ttrpc may have.
                guest.sendall(HEADER.pack(4 << 20, stream, RESPONSE, 0) + bytes(4 << 20))
            asked.read()

    server = threading.Thread(target=serve)
    server.start()
    refused: list[str] = []

    def wait() -> None:
        with pytest.raises(ResourceExhaustedError) as error:
            guest.wait("c1", 20.0)
        refused.append(error.value.message)

    with Guest(tmp_path) as guest:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waiting = [threading.Thread(target=wait) for _ in range(calls)]
        for one in waiting:
            one.start()
        for one in waiting:
            one.join()
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    server.join()
    listener.close()
    assert len(refused) == calls
    assert grown_kib < 32 << 10


def test_a_silent_guest_keeps_nobody_who_asks_for_the_statistics_of_a_whole_node() -> None:
    answering = True

    def answer(method: str, _request: Any) -> Any:
        if not answering:
            raise DeadlineExceededError("no answer")
        return v1.StatsResponse(memory_bytes=12345) if method == "Stats" else v1.PidsResponse(pids=[7, 8])

    guest = FakeGuest(answer)
    task = running(Reactor(), "own")
    usage = stats.Usage(guest.as_pod)
    assert usage.pids(task) == [7, 8]
    before = usage.stats(task)
    answering = False
    assert usage.stats(task).value == before.value
    asked = len(guest.asked)
    assert [usage.stats(task).value for _ in range(50)] == [before.value] * 50
    assert usage.pids(task) == [4711]
    assert len(guest.asked) == asked, "it is left alone for a while"
