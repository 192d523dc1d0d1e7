"""What makes a node of a process tree on this machine: a network and mounts of its own.

Below a node's mounts the host's files are there, but what is written to /etc, /opt, /run, /usr/local and /var/lib stays
the node's: two kubelets do not share /var/lib/kubelet, and an installation touches no file of the host. All of it,
and every mount that containers make, ends with the process that holds the namespaces open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_PRIVATE = ("/etc", "/opt", "/usr/local", "/var/lib")
#: Models, guest images and packed layers are the host's, as they are large and named by their digests.
_STATE = "/var/lib/remora"
RUNTIME = "/run/remora"


class NodeSpaces:
    """The namespaces; `close` ends whatever runs in them.

    Args:
        base: directory for the node's own files.
        runtime: what is /run/remora there, so that tests see it from outside.
        bare: nobody has set the node up for Remora; of the host's state it has the models alone.
    """

    def __init__(self, base: Path, runtime: Path, *, bare: bool = False) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sleep", "infinity"], start_new_session=True
        )
        self.pid = self._holder.pid
        deadline_s = time.monotonic() + 10
        while self._exe() != "sleep":
            assert time.monotonic() < deadline_s, "no namespaces for a node"
            time.sleep(0.01)
        self._upper = base / "private/upper"
        state = base / "state-of-node"
        for directory in (runtime, state):
            directory.mkdir(exist_ok=True)
        # Before the host's /var/lib is covered.
        if bare:
            self.run("mount", "--bind", str(state), str(state))
            (state / "models").mkdir()
            self.run("mount", "--bind", f"{_STATE}/models", str(state / "models"))
        else:
            self.run("mount", "--bind", _STATE, str(state))
        for place in _PRIVATE:
            upper, work = self._upper / place.strip("/"), base / "private/work" / place.strip("/")
            upper.mkdir(parents=True)
            work.mkdir(parents=True)
            self.run("mount", "-t", "overlay", "-o", f"lowerdir={place},upperdir={upper},workdir={work}", "node", place)
        self.run("mount", "--move", str(state), _STATE)
        self.run("mount", "-t", "tmpfs", "node", "/run")
        self.run("mkdir", "-p", RUNTIME, "/run/netns", "/run/lock")
        self.run("mount", "--bind", str(runtime), RUNTIME)

    def _exe(self) -> str:
        return os.path.basename(os.readlink(f"/proc/{self.pid}/exe"))

    def within(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs another one here."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.within(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
        return done.stdout

    def path(self, name: str) -> Path:
        """Return where a file of the node is to be found from outside."""
        return Path(f"/proc/{self.pid}/root{name}")

    def written(self) -> set[str]:
        """Return the files of the node that are not the host's, but for what kubelet and CNI keep below /var/lib."""
        # Not by glob, which fails where files go meanwhile.
        found = [Path(folder, name) for folder, _, names in os.walk(self._upper) for name in names]
        files = {f"/{path.relative_to(self._upper)}" for path in found}
        files |= {
            f"{_STATE}/{path}"
            for path in self.run("find", _STATE, "-xdev", "!", "-type", "d", "-printf", "%P\n").split("\n")
        }
        return {file for file in files if not file.startswith(("/var/lib/kubelet", "/var/lib/cni"))}

    def mounts(self) -> list[str]:
        """Return where something is mounted."""
        return [line.split()[1] for line in Path(f"/proc/{self.pid}/mounts").read_text().splitlines()]

    def processes(self) -> dict[int, str]:
        """Return the command of each process that sees the node's mounts; those of containers see their own."""
        ours = os.readlink(f"/proc/{self.pid}/ns/mnt")
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/mnt") == ours and int(process.name) != self.pid:
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(process.name)] = command
        return found

    def close(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.kill()
        self._holder.wait()
