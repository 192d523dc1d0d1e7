"""`remora run --jail`: a real guest behind a fake Firecracker, which a fake jailer has really locked in.

Neither Firecracker nor its jailer can do that here without KVM. All else is the real thing: the root, the user, the
cgroup, the guest that QEMU emulates in there, its AF_VSOCK, and the sockets by which host and agent reach it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import fake_jailer
import fake_vmm
from agent_process import AgentProcess
from microvms import Remora, wait_until

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="the jailer needs root"),
]
FIRST, LAST = 54100, 54101


class Prison:
    """The directory with the programs and the jails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "jails"
        fake_vmm.install(folder, "firecracker", "1.17.0", guest="real")
        fake_jailer.install(folder, "1.17.0")
        self.env = {"PATH": f"{folder}:{os.environ['PATH']}", "REMORA_ACCELERATOR": "kvm"}
        self.options = ("--vmm", "firecracker", "--jail", f"uid={FIRST}-{LAST}", "--jail", f"base={self.base}")

    def processes(self) -> list[psutil.Process]:
        """Those that run as one of the jails' users."""
        return [p for p in psutil.process_iter(["uids"]) if p.info["uids"] and FIRST <= p.info["uids"].real <= LAST]

    def empty(self) -> bool:
        return not self.processes() and not (self.base.exists() and list(self.base.iterdir()))


@pytest.fixture
def prison(remora: Remora, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prison]:
    with tempfile.TemporaryDirectory(prefix="rj-") as name:
        made = Prison(Path(name))
        for variable, value in made.env.items():
            monkeypatch.setitem(remora.env, variable, value)
        yield made
        wait_until(made.empty, "no jail and nobody in one to be left")


def test_a_command_runs_in_a_jail_as_its_user_and_leaves_nothing(remora: Remora, prison: Prison) -> None:
    before = set(Path("/sys/fs/cgroup").glob("*/remora/*"))
    with remora.start(
        "run", *prison.options, "--no-accel", "--jail", "cgroup=pids.max=64", remora.image, "sh", "-c", "cat; exit 7",
    ) as run:  # fmt: skip
        wait_until(lambda: [r for r in remora.records() if r["state"] == "running"], "it to run")
        (record,) = remora.records()
        root = prison.base / "firecracker" / record["id"] / "root"
        inside = prison.processes()
        names = {process.name() for process in inside}
        assert any("qemu" in name for name in names), names
        for process in inside:
            assert os.stat(f"/proc/{process.pid}/root").st_ino == root.stat().st_ino
            assert process.uids() == (FIRST,) * 3
            assert process.gids() == (FIRST,) * 3
            assert os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
            assert f"/remora/{record['id']}" in Path(f"/proc/{process.pid}/cgroup").read_text()
        assert (root.stat().st_uid, root.stat().st_mode & 0o777) == (FIRST, 0o700)
        assert root.joinpath("kernel").stat().st_uid == 0
        assert root.joinpath("dev/kvm").is_char_device()
        output, errors = run.communicate(b"hello", timeout=60)
    assert (run.returncode, output) == (7, b"hello"), errors
    wait_until(prison.empty, "nothing to be left")
    assert set(Path("/sys/fs/cgroup").glob("*/remora/*")) == before


@pytest.mark.parametrize("victims", ["monitor's process", "remora run", "everything that looks after it"])
def test_whoever_is_killed_no_jail_is_left(remora: Remora, prison: Prison, victims: str) -> None:
    with remora.start(
        "run",
        *prison.options,
        "--no-accel",
        remora.image,
        "sleep",
        "1000",
    ) as run:
        wait_until(lambda: [r for r in remora.records() if r["state"] == "running"], "it to run")
        (record,) = remora.records()
        if victims == "monitor's process":
            next(p for p in prison.processes() if "fake_vmm" in " ".join(p.cmdline())).kill()
            assert run.wait(60) == 10
            assert b"Firecracker was killed by signal 9" in (run.stderr.read() if run.stderr else b"")
        elif victims == "remora run":
            run.kill()
        else:
            monitor = psutil.Process(record["monitor_pid"])
            keeper = monitor.parent()
            assert keeper is not None
            for process in (keeper, monitor):
                process.send_signal(signal.SIGSTOP)
            for process in (keeper, monitor):
                process.kill()
            run.wait(60)
            # Nobody is left to clear up, and still nobody runs on in the jail.
            wait_until(lambda: not prison.processes(), "the jail to be empty")
            assert (prison.base / "firecracker" / record["id"]).exists()
            assert remora.json("ps", "--json") == []
    wait_until(prison.empty, "nothing to be left")


def test_a_jailed_guest_reaches_the_agent(image: str, prison: Prison) -> None:
    folder = prison.folder / "a"
    folder.mkdir()
    agent = AgentProcess(folder)
    agent.start()
    try:
        code = "import remora; s = remora.connect(); print(s.ping() > 0); s.close()"
        remora = Remora(agent.control.parent, image)
        remora.env.update(prison.env)
        done = remora("run", *prison.options, image, "python3", "-c", code)
        assert (done.stdout, done.stderr) == (b"True\n", b""), agent.log
        wait_until(lambda: "sandbox detached" in agent.log, "the sandbox to be detached")
    finally:
        assert agent.stop(signal.SIGTERM) == 0


def test_two_jails_have_two_users_and_a_third_is_refused(remora: Remora, prison: Prison) -> None:
    for _ in range(2):
        done = remora("run", "-d", *prison.options, "--no-accel", remora.image, "sleep", "1000")
        assert done.returncode == 0, done.stderr.decode()
    assert {record["jail"]["uid"] for record in remora.records()} == {FIRST, LAST}
    third = remora("run", *prison.options, "--no-accel", remora.image, "true")
    assert f"each user from {FIRST} to {LAST} has a microVM".encode() in third.stderr
    ids = [record["id"] for record in remora.records()]
    said = remora("exec", ids[0], "echo", "here")
    assert said.stdout == b"here\n", said.stderr
    assert remora("rm", "-f", *ids).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vmm", "qemu", "--jail", "uid=30000"), b"add --vmm firecracker"),
        (("--vmm", "firecracker", "--jail", "gid=30000"), b"--jail uid=30000-30999"),
        (("--vmm", "firecracker", "--jail", "uid=0"), b"names no unprivileged user"),
        (("--vmm", "firecracker", "--jail", "uid=30000", "--jail", "netns=/none"), b"ip netns add"),
    ],
)
def test_a_jail_that_cannot_be_is_refused_with_what_to_do(
    remora: Remora, prison: Prison, options: tuple[str, ...], message: bytes
) -> None:
    done = remora("run", "--no-accel", *options, remora.image, "true")
    assert done.returncode in (2, 7)
    assert message in done.stderr


def test_templates_are_refused_in_a_jail(remora: Remora, prison: Prison) -> None:
    done = remora("template", "create", *prison.options, "--no-accel", "jailed", remora.image)
    assert done.returncode == 7
    assert b"leave --jail out" in done.stderr


def test_without_a_jailer_on_path_it_is_named(remora: Remora, prison: Prison) -> None:
    (prison.folder / "jailer").unlink()
    done = remora("run", *prison.options, "--no-accel", remora.image, "true")
    assert done.returncode == 7
    assert b"put the jailer of the same release on PATH" in done.stderr
