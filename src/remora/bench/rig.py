"""A real agent of its own for a measurement: started on a directory that is gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remora.errors import UnavailableError

_START_TIMEOUT_S = 30


@dataclass(frozen=True)
class Rig:
    """A running agent. Whoever makes sandboxes for it must have REMORA_RUNTIME_DIR set to `runtime`."""

    directory: Path
    runtime: Path
    address: str
    pid: int


@contextmanager
def agent(config: str | None = None, models: Path | None = None, *, oip_port: int = 0) -> Iterator[Rig]:
    """Run an agent on a Unix socket in a temporary directory.

    Args:
        config: text of its configuration file.
        models: its catalogue; the machine's own unless given.
        oip_port: port of the loopback on which it serves the Open Inference Protocol, too, besides the socket
            `oip.sock` in its directory; 0: neither.

    Raises:
        UnavailableError: it ended before it listened; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="remora-") as name:
        directory = Path(name)
        runtime = directory / "run"
        address = f"unix://{directory}/accel.sock"
        log = directory / "agent.log"
        command = [sys.executable, "-m", "remora", "agent", "--listen", address, "--state", f"{directory}/state"]
        if oip_port:
            command += ["--listen", f"oip+unix://{directory}/oip.sock", "--listen", f"oip+tcp://127.0.0.1:{oip_port}"]
        if config is not None:
            (directory / "agent.toml").write_text(config)
            command += ["--config", f"{directory}/agent.toml"]
        if models is not None:
            command += ["--models", str(models)]
        ready_r, ready_w = os.pipe()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--ready-fd", str(ready_w)],
                pass_fds=[ready_w],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "REMORA_RUNTIME_DIR": str(runtime)},
                start_new_session=True,  # Ctrl-C is for whoever measures; the agent is told when they are done
            )
        os.close(ready_w)
        try:
            with os.fdopen(ready_r, "rb") as ready:
                if not ready.readline():
                    raise UnavailableError(f"the agent did not start:\n{log.read_text()[-2000:]}")
            yield Rig(directory, runtime, address, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
