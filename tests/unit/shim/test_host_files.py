"""What of the host a pod's guest may write: its last words, into the kubelet's file for them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from remora.errors import InvalidArgumentError
from remora.reactor import Reactor
from remora.shim import exits, volumes
from remora.shim.streams import Streams
from remora.shim.task import KILLED, Process, Task


def mount(source: Path, destination: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}


def test_a_host_path_at_the_place_of_the_termination_log_is_not_written(tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    with pytest.raises(InvalidArgumentError, match="shares no writable files"):
        volumes.find(mount(secret, "/dev/termination-log"), "pod")


@pytest.mark.parametrize("destination", ["/dev/termination-log", "/var/last-words"])
def test_the_kubelets_message_file_comes_back_wherever_the_container_has_it(tmp_path: Path, destination: str) -> None:
    message = tmp_path / "pods" / "u-1" / "containers" / "web" / "0a1b2c3d"
    message.parent.mkdir(parents=True)
    message.touch()
    assert volumes.find(mount(message, destination), "pod").volume.returned


@pytest.mark.parametrize("status", [-1, -(1 << 31), 256, (1 << 31) - 1])
def test_a_container_has_an_end_whatever_status_its_guest_reports(status: int) -> None:
    reactor, published = Reactor(), []
    guest = SimpleNamespace(wait=lambda *_args, **_more: SimpleNamespace(exit_status=status, oom_kills=0))
    pod = SimpleNamespace(vm=SimpleNamespace(guest=guest), bring_back=lambda _task: None)
    publisher = SimpleNamespace(publish=lambda event: published.append(event.to_bytes()))
    ooms = SimpleNamespace(tell=lambda _task, _kills: None)
    process = Process("c1", "", Streams(reactor, "", "", "", terminal=False))
    process.status = 2
    task = Task("c1", "/nowhere", "container", process)
    watcher = exits.Exits(reactor, cast(Any, publisher), cast(Any, pod), cast(Any, ooms))
    watcher._wait(task, process)
    for _ in range(100):
        if published:
            break
        reactor.run_once(0.1)
    assert (process.exit_status, len(published)) == (KILLED, 1)
