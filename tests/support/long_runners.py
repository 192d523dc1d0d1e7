"""The long-running programs of a test: started with a log each, ended in the end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


class LongRunners:
    """Programs by name; each one's output goes to `<logs>/<name>.log`, also over restarts."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, tuple[list[str], subprocess.Popen[bytes]]] = {}

    def start(self, name: str, command: Sequence[str]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self._logs,
            )
        self._running[name] = ([*command], process)

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End one and start it again as it was, as a crash or an upgrade would."""
        command, _ = self._running[name]
        self.end(name, signum)
        self.start(name, command)

    def end(self, name: str, signum: int = signal.SIGTERM) -> None:
        if name not in self._running:
            return
        _, process = self._running.pop(name)
        process.send_signal(signum)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End all, the youngest first."""
        for name in reversed(list(self._running)):
            self.end(name)

    def tails(self) -> str:
        """Return the last lines of every log."""
        logs = sorted(self._logs.glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + log.read_text(errors="replace")[-1500:] for log in logs)
