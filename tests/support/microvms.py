"""What the end-to-end tests of `remora run` and its kin share: a function image, a run-time directory, the command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: What a booted function does here: says who it is, then answers each line. `ready` takes a template at that point.
FUNCTION = """\
import os, random, socket, sys, time
import remora

print("loading", flush=True)
random.seed(1)
remora.ready()
print(socket.gethostname(), random.random(), os.urandom(8).hex(), time.time(), flush=True)
for line in sys.stdin:
    print("got", line.strip(), flush=True)
"""
RECIPE = """\
[image]
name = "{name}"
base = "host"
packages = ["python3-minimal", "libpython3-stdlib"]

[files]
"/srv/function.py" = "function.py"

[run]
cmd = ["python3", "/srv/function.py"]
"""
DEADLINE_S = 60.0


class Remora:
    """The `remora` command with a run-time directory of its own."""

    def __init__(self, runtime: Path, image: str) -> None:
        self.runtime = runtime
        self.image = image
        self.env = {**os.environ, "REMORA_RUNTIME_DIR": str(runtime)}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "remora.cli.main", *arguments]

    def __call__(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = DEADLINE_S,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end; stdin is empty unless given."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            env={**self.env, **(env or {})},
            timeout=timeout_s,
            check=False,
        )

    @contextlib.contextmanager
    def start(self, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start and let it run meanwhile; stdin, stdout and stderr are pipes unless told otherwise."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(self.command(*arguments), env=self.env, **{**pipes, **options}) as process:
            try:
                yield process
            finally:
                # A failed assertion must not wait for a process that waits for input.
                process.kill()

    def json(self, *arguments: str) -> Any:
        done = self(*arguments)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def records(self) -> list[dict[str, Any]]:
        """Return the records as they lie on disk, without the sweep that every command does."""
        found = []
        for path in self.runtime.glob("s/*/state.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append(json.loads(path.read_text()))
        return found


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.01)


def build_image(directory: Path, name: str) -> Iterator[str]:
    """Build the test function's image for as long as the generator is open."""
    (directory / "function.py").write_text(FUNCTION)
    (directory / "remora.toml").write_text(RECIPE.format(name=name))
    remora = [sys.executable, "-m", "remora.cli.main", "image"]
    built = subprocess.run([*remora, "build", str(directory)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    yield name
    subprocess.run([*remora, "remove", name], capture_output=True, check=True)
