"""containerd's events, as `ctr events` prints them, kept in order."""

from __future__ import annotations

import json
import subprocess
import threading
from types import TracebackType
from typing import NamedTuple

from containerd_process import Containerd
from pod_leftovers import wait_until


class Event(NamedTuple):
    topic: str
    fields: dict[str, object]


class Events:
    """`with Events(containerd) as events:` listens from there on."""

    def __init__(self, containerd: Containerd) -> None:
        self._process = subprocess.Popen(containerd.argv("events"), stdout=subprocess.PIPE, text=True)
        self._seen: list[Event] = []
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Events:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._thread.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            head, brace, rest = line.partition("{")
            self._seen.append(Event(head.split()[-1], json.loads(brace + rest)))

    def of(self, container: str) -> list[str]:
        """Return the topics of a container's events so far."""
        return [one.topic for one in list(self._seen) if container == one.fields.get("container_id")]

    def wait_for(self, topic: str, container: str, count: int = 1) -> None:
        wait_until(lambda: self.of(container).count(topic) >= count, f"{count} {topic}: {self.of(container)}")
