"""`containerd-shim-remora-v2 start` and its kin, as containerd runs them: a real process in a bundle's directory."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remora.sandboxes.registry import Registry
from remora.shim import launcher, start
from remora.wire import containerd as c
from remora.wire.ttrpc.sync import Client

TASK = "containerd.task.v2.Task"


class Bed:
    def __init__(self, base: Path) -> None:
        self.base = base
        self.program = launcher.write(base)
        self.addresses: set[str] = set()

    def bundle(self, container: str, **annotations: str) -> Path:
        folder = self.base / container
        folder.mkdir()
        config = {"annotations": {key.replace("_", "-"): value for key, value in annotations.items()}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def run(self, folder: Path, *more: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        flags = ["-namespace", "t", "-address", "/c.sock", "-publish-binary", "containerd", "-id", folder.name]
        return subprocess.run(
            [str(self.program), *flags, *more],
            cwd=folder,
            input=stdin,
            capture_output=True,
            timeout=30,
            check=False,
        )

    def start(self, folder: Path, stdin: bytes = b"") -> str:
        done = self.run(folder, "start", stdin=stdin)
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode()
        self.addresses.add((folder / "address").read_text())
        return text

    def client(self, address: str) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("unix://"))
        return Client(sock)

    def close(self) -> None:
        for address in self.addresses:
            with self.client(address) as client:
                client.call(TASK, "Shutdown", c.ShutdownRequest(), c.Empty, timeout_s=10)
            deadline_s = time.monotonic() + 10
            while Path(address.removeprefix("unix://")).exists():
                assert time.monotonic() < deadline_s, "the server has not gone away"
                time.sleep(0.01)


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    import tempfile

    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="rs") as folder:
        monkeypatch.setenv("REMORA_RUNTIME_DIR", f"{folder}/r")
        one = Bed(Path(folder))
        yield one
        one.close()


def test_start_prints_the_address_alone_and_its_server_answers(bed: Bed) -> None:
    address = bed.start(bed.bundle("one"))
    assert address.startswith("unix:///")
    assert "\n" not in address
    with bed.client(address) as client:
        for service in c.TASK_SERVICES:
            answer = client.call(service, "Connect", c.ProcessRequest(id="one"), c.ConnectResponse, timeout_s=10)
            assert answer.shim_pid > 0
            assert answer.task_pid == 0


def test_containers_of_a_pod_get_the_pods_address_and_other_pods_another(bed: Bed) -> None:
    cri = "io.kubernetes.cri."
    sandbox = bed.bundle("pod1", **{f"{cri}container-type": "sandbox", f"{cri}sandbox-id": "pod1"})
    member = bed.bundle("c1", **{f"{cri}container-type": "container", f"{cri}sandbox-id": "pod1"})
    address = bed.start(sandbox)
    assert bed.start(member) == address
    assert (member / "address").read_text() == address
    assert bed.start(bed.bundle("other")) != address


def test_a_container_whose_pod_is_gone_is_refused(bed: Bed) -> None:
    cri = "io.kubernetes.cri."
    member = bed.bundle("c1", **{f"{cri}container-type": "container", f"{cri}sandbox-id": "gone"})
    done = bed.run(member, "start")
    assert done.returncode == 1
    assert b"the pod gone has no shim any more" in done.stderr
    assert done.stdout == b""


def test_a_containerd_that_says_what_it_understands_gets_the_third_version(bed: Bed) -> None:
    parameters = b"\x0a\x03new\x12\x01t"  # BootstrapParams: instance_id, namespace
    answer = json.loads(bed.start(bed.bundle("new"), parameters))
    assert (answer["version"], answer["protocol"]) == (3, "ttrpc")
    assert answer["address"] in bed.addresses
    # Options of an older one, as an Any.
    options = b"\x0a\x19runtimeoptions.v1.Options\x12\x00"
    assert bed.start(bed.bundle("old"), options).startswith("unix://")


def test_a_socket_left_by_a_killed_server_is_no_obstacle(bed: Bed) -> None:
    folder = bed.bundle("again")
    path = Path(start.socket_path("/c.sock", "t", "again"))
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert bed.start(folder) == f"unix://{path}"


def test_an_agent_that_does_not_answer_keeps_nothing_of_a_dead_pod_alive(bed: Bed) -> None:
    """containerd gives `delete` five seconds; it may be killed in the middle, and nobody asks again."""
    folder = bed.bundle("dead")
    runtime = bed.base / "r"
    address = bed.start(folder)
    path = Path(address.removeprefix("unix://"))
    with bed.client(address) as client:
        answer = client.call(TASK, "Connect", c.ProcessRequest(id="dead"), c.ConnectResponse, timeout_s=10)
    os.kill(answer.shim_pid, signal.SIGKILL)
    bed.addresses.clear()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(bed.base / "silent"))
        silent.listen()
        record, lock = Registry(runtime).create({"container": "dead", "control_socket": str(bed.base / "silent")})
        os.close(lock)
        process = subprocess.Popen(
            [
                str(bed.program),
                "-namespace",
                "t",
                "-address",
                "/c.sock",
                "-id",
                "dead",
                "-bundle",
                str(folder),
                "delete",
            ],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        with process:
            silent.settimeout(10)
            connection, _ = silent.accept()
            # While it still waits for the agent's answer.
            left = path.exists(), record.directory.exists()
            connection.close()
        assert process.returncode == 0
    assert left == (False, False)


def test_delete_is_harmless_before_and_after_everything(bed: Bed) -> None:
    folder = bed.bundle("gone")
    for _ in range(2):
        done = bed.run(folder, "-bundle", str(folder), "delete")
        assert done.returncode == 0, done.stderr
        assert c.DeleteResponse.decode(done.stdout).exit_status == 137


def test_info_and_version_and_what_is_no_action(bed: Bed) -> None:
    folder = bed.bundle("any")
    info = c.RuntimeInfo.decode(bed.run(folder, "-info").stdout)
    assert info.name == "io.containerd.remora.v2"
    assert b"Version" in bed.run(folder, "-v").stdout
    done = bed.run(folder, "strat")
    assert done.returncode == 1
    assert b"has no action 'strat'" in done.stderr


@pytest.mark.parametrize(
    "line", ["-id a -debug start", "--id a --debug start", "-id=a -debug start", "-id a -unknown b -debug start"]
)
def test_flags_in_every_form_that_go_programs_take(line: str) -> None:
    flags, action = start.parse(line.split())
    assert (flags["id"], flags["debug"], action) == ("a", "true", "start")


def test_an_annotation_is_found_without_parsing() -> None:
    text = b'{"annotations":{"io.kubernetes.cri.sandbox-id":"abc", "x":"y"}}'
    assert start.annotation(text, b'"io.kubernetes.cri.sandbox-id"') == "abc"
    assert start.annotation(text.replace(b'":"', b'": "'), b'"io.kubernetes.cri.sandbox-id"') == "abc"
    assert start.annotation(text, b'"io.kubernetes.cri.container-type"') == ""


def test_the_fast_path_imports_nothing_but_c_modules() -> None:
    tree = ast.parse(Path(start.__file__).read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "posix", "sys"}
