"""Kills parts of Remora at random moments, many times, and looks for what is left: issue line 6 as a program.

    python tests/e2e/chaos.py 50 [--seed N] [--boot]

Each round starts an agent if none runs and a microVM (a clone; with --boot every fifth round boots cold), waits a
random time, and sends SIGKILL to one of: the agent, a worker, QEMU, `remora run`, the monitor, the keeper. Then the
next run and the next request must succeed, nothing of the dead microVM may be left, and a model that was uploaded and
acknowledged in the first round must still be there without being sent again. Exit status 0 if all rounds held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import remora as sdk
from microvms import Remora, build_image, wait_until
from remora import paths
from remora.errors import RemoraError
from remora.sandboxes.leftovers import find_leftovers

VICTIMS = ("agent", "worker", "qemu", "run", "monitor", "keeper")
ANSWER_S = 60.0


class Chaos:
    """The rounds of one session; `run` returns what went wrong."""

    def __init__(self, runtime: Path, image: str, seed: int) -> None:
        self.remora = Remora(runtime, image)
        self.random = random.Random(seed)
        self.state = runtime.with_name(runtime.name + "-agent")
        self.log = runtime.with_name(runtime.name + "-agent.log")
        self.address = f"unix://{runtime}/accel.sock"
        self.agent: subprocess.Popen[bytes] | None = None
        self.model = paths.state_dir() / "models" / "identity" / "model.onnx"
        self.template = f"chaos-{secrets.token_hex(4)}"
        self.session: sdk.Session | None = None
        self.uploaded: Any = None

    # -- the parts --------------------------------------------------------------------------------------------------

    def ensure_agent(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            return
        read_end, write_end = os.pipe()
        command = self.remora.command("agent", "--listen", self.address, "--state", str(self.state))
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                [*command, "--ready-fd", str(write_end)], env=self.remora.env, stderr=log, pass_fds=[write_end]
            )
        os.close(write_end)
        with os.fdopen(read_end) as ready:
            if not ready.readline():
                raise AssertionError("the agent did not start; see its log")

    def stored(self) -> set[str]:
        """Return the files of the agent's resource store."""
        return {path.name for path in self.state.rglob("*") if path.is_file() and len(path.name) >= 64}

    def check_request(self) -> None:
        """A request on the long-lived session must be answered, over every restart of the agent."""
        assert self.session is not None
        value = self.uploaded.infer({self.uploaded.inputs[0].name: IDENTITY_INPUT})
        assert value, "the identity model gave nothing back"

    def workers(self) -> list[int]:
        """Return the processes below the agent."""
        assert self.agent is not None
        return [pid for pid in descendants(self.agent.pid) if pid != self.agent.pid]

    # -- one round --------------------------------------------------------------------------------------------------

    def round(self, number: int, *, boot: bool) -> str:
        self.ensure_agent()
        victim = self.random.choice(VICTIMS)
        source = [self.remora.image] if boot and number % 5 == 4 else ["--template", self.template]
        with self.remora.start("run", *source) as process:
            time.sleep(self.random.uniform(0, 4.0 if source[0] == self.remora.image else 0.8))
            hit = self.kill(victim, process)
            if victim == "agent" or victim == "worker":
                self.ensure_agent()
        self.check_after()
        return f"{victim}{'' if hit else ' (was not there yet)'}"

    def kill(self, victim: str, process: subprocess.Popen[bytes]) -> bool:
        records = self.remora.records()
        record = records[0] if records else {}
        pids: list[int] = []
        if victim == "agent" and self.agent is not None:
            pids = [self.agent.pid]
        elif victim == "worker":
            workers = self.workers()
            pids = [self.random.choice(workers)] if workers else []
        elif victim == "run":
            pids = [process.pid]
        elif victim == "qemu":
            pids = [record["machine_pid"]] if "machine_pid" in record else []
        elif victim == "monitor":
            pids = [record["monitor_pid"]] if "monitor_pid" in record else []
        elif victim == "keeper" and "monitor_pid" in record:
            with contextlib.suppress(FileNotFoundError):
                stat = Path(f"/proc/{record['monitor_pid']}/stat").read_text()
                pids = [int(stat.rpartition(")")[2].split()[1])]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if victim == "agent" and self.agent is not None:
            self.agent.wait()
        return bool(pids)

    def check_after(self) -> None:
        done = self.remora("run", "--template", self.template, stdin=b"hello\n", timeout_s=ANSWER_S)
        assert done.returncode == 0, f"the next run failed: {done.stderr.decode()}"
        assert b"got hello" in done.stdout, f"the next run answered {done.stdout!r}"
        assert b"no accelerator" not in done.stderr, done.stderr.decode()
        self.check_request()
        sandboxes = self.remora.runtime / "s"
        wait_until(lambda: not find_leftovers(sandboxes), f"no leftovers, but: {find_leftovers(sandboxes)}", 20)

    def run(self, count: int, *, boot: bool) -> list[str]:
        failures = []
        self.ensure_agent()
        made = self.remora("template", "create", "--quiet", self.template, self.remora.image)
        assert made.returncode == 0, made.stderr.decode()
        try:
            self.session = sdk.connect(self.address)
            self.uploaded = self.session.load(self.model)
            before = self.stored()
            for number in range(count):
                began_s = time.monotonic()
                try:
                    what = self.round(number, boot=boot)
                    missing = before - self.stored()
                    assert not missing, f"acknowledged resources are gone: {missing}"
                    print(f"{number + 1:3}  {what:32} {time.monotonic() - began_s:5.1f} s", flush=True)
                except (AssertionError, RemoraError, subprocess.TimeoutExpired) as error:
                    failures.append(f"round {number + 1}: {error}")
                    print(f"{number + 1:3}  FAILED: {error}", flush=True)
        finally:
            self.close()
        return failures

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.remora("template", "remove", self.template)
        if self.agent is not None and self.agent.poll() is None:
            self.agent.terminate()
            self.agent.wait(20)
        shutil.rmtree(self.state, ignore_errors=True)
        self.log.unlink(missing_ok=True)


#: One float32 tensor of four dimensions, as the identity model takes it.
IDENTITY_INPUT = sdk.Tensor(bytes(8), "float32", (1, 1, 1, 2))


def descendants(pid: int) -> list[int]:
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found += descendants(int(entry.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=50)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--boot", action="store_true", help="every fifth round boots cold")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="rc-") as runtime, tempfile.TemporaryDirectory() as function:
        image = build_image(Path(function), f"chaos-{secrets.token_hex(4)}")
        try:
            failures = Chaos(Path(runtime), next(image), args.seed).run(args.count, boot=args.boot)
        finally:
            next(image, None)
    print(f"{args.count - len(failures)} of {args.count} rounds held")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
