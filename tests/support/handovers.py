"""An agent that is succeeded by another while clients use it: each one's answers are counted, and what went wrong."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field

import remora
from agent_process import AgentProcess
from remora.client.tensors import Tensor


def number_tensor(value: float) -> Tensor:
    import struct

    return Tensor(struct.pack("<f", value), "float32", [1, 1, 1, 1])


@dataclass
class Caller:
    """Sends numbers to the identity model in a loop, on one session or on a new one each time."""

    address: str
    fresh: bool = False
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    longest_s: float = 0.0

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                with remora.connect(self.address, reconnect_s=30.0) as session:
                    self._use(session, stop)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _use(self, session: remora.Session, stop: threading.Event) -> None:
        import struct

        while not stop.is_set():
            began_s = time.monotonic()
            value = float(self.answers % 1000)
            answer = session.infer("identity", {"input": number_tensor(value)}, arrays=False)
            got = struct.unpack("<f", bytes(next(iter(answer.values())).data))[0]
            if got != value:
                self.wrong.append(f"asked {value}, got {got}")
            self.answers += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.sessions.add(session.id)
            if self.fresh:
                return


def succeed(agent: AgentProcess, *more: str) -> subprocess.Popen[bytes]:
    """Start a successor, and wait for both: it serves, and the other one has ended well. Returns the other one."""
    old = agent.release()
    agent.start("--takeover", *more)
    assert old.wait(30) == 0, agent.log[-3000:]
    return old
