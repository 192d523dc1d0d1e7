"""The agent is killed at any moment: sessions, uploads and attachments are there when it comes back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, wait_until
from remora.errors import DataLossError, RemoraError
from remora.wire import control_v1, remora_v1

CONFIG = "[limits]\nlease_s = 30\n"


@pytest.fixture
def own_agent(tmp_path: Path, models: Path) -> Iterator[AgentProcess]:
    """An agent that the test may kill."""
    running = AgentProcess(tmp_path, config=CONFIG, models=models)
    running.start()
    yield running
    running.stop()
    assert "internal error" not in running.log, running.log[-3000:]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_after_sigkill_a_session_resumes_with_its_model_and_nothing_is_uploaded_again(
    own_agent: AgentProcess, identity_model: bytes
) -> None:
    digest = digest_of(identity_model)
    with Guest(own_agent.connect()) as guest:
        guest.upload(digest, identity_model)
        guest.load(digest)
        token = guest.token
        own_agent.kill()
    own_agent.start()
    with Guest(own_agent.connect(), token) as guest:
        assert guest.hello.resumed
        assert guest.stat(digest).complete
        assert struct.unpack("<f", guest.infer(digest, 3.0).outputs[0].data) == (3.0,)


def test_an_unfinished_upload_goes_on_after_sigkill(own_agent: AgentProcess) -> None:
    data = os.urandom(300_000)
    digest = digest_of(data)
    with Guest(own_agent.connect()) as guest:
        for offset in (0, 100_000):
            request = remora_v1.PutResourceRequest(
                digest=digest, offset=offset, total_bytes=len(data), data=data[offset : offset + 100_000]
            )
            guest.call("PutResource", request, remora_v1.PutResourceResponse)
        own_agent.kill()
    own_agent.start()
    with Guest(own_agent.connect()) as guest:
        assert guest.stat(digest).received_bytes == 200_000
        request = remora_v1.PutResourceRequest(
            digest=digest, offset=200_000, total_bytes=len(data), data=data[200_000:]
        )
        assert guest.call("PutResource", request, remora_v1.PutResourceResponse).complete


def test_workers_do_not_outlive_a_killed_agent(own_agent: AgentProcess) -> None:
    with Guest(own_agent.connect()) as guest:
        guest.infer("identity")
        workers = children(own_agent.pid)
        assert workers
        own_agent.kill()
    wait_until(lambda: all(gone(pid) for pid in workers), "the workers have ended")


def test_attachments_are_served_again_and_the_missing_ones_dropped(own_agent: AgentProcess) -> None:
    stays, vanishes = own_agent.attach("stays", tenant="team", labels={"a": "b"}), own_agent.attach("vanishes")
    with Guest(own_agent.connect(stays)) as guest:
        token = guest.token
    own_agent.kill()
    for path in vanishes.parent.iterdir():
        path.unlink()
    vanishes.parent.rmdir()
    own_agent.start()
    attachments = own_agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse).attachments
    assert [(entry.sandbox, entry.tenant, dict(entry.labels)) for entry in attachments] == [
        ("stays", "team", {"a": "b"})
    ]
    with Guest(own_agent.connect(stays), token) as guest:
        assert guest.hello.resumed


def test_killed_at_random_moments_no_acknowledged_upload_is_lost(own_agent: AgentProcess) -> None:
    chance = random.Random(3)
    acknowledged: list[str] = []
    for _round in range(5):
        killer = threading.Timer(chance.uniform(0.02, 0.25), os.kill, (own_agent.pid, signal.SIGKILL))
        killer.start()
        try:
            with Guest(own_agent.connect()) as guest:
                while True:
                    data = os.urandom(50_000)
                    if guest.upload(digest_of(data), data).complete:
                        acknowledged.append(digest_of(data))
        except (RemoraError, OSError):
            pass  # killed in the middle, as intended
        killer.join()
        own_agent.kill()
        own_agent.start()
    assert acknowledged
    with Guest(own_agent.connect()) as guest:
        assert all(guest.stat(digest).complete for digest in acknowledged)
    stored = list((own_agent.state / "resources").glob("*/*"))
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in stored)


def test_a_damaged_resource_is_data_loss_and_can_be_uploaded_again(
    own_agent: AgentProcess, identity_model: bytes
) -> None:
    digest = digest_of(identity_model)
    with Guest(own_agent.connect()) as guest:
        guest.upload(digest, identity_model)
        (path,) = (own_agent.state / "resources").glob("*/*")
        path.chmod(0o600)
        path.write_bytes(b"!" + identity_model[1:])
        with pytest.raises(DataLossError, match="damaged"):
            guest.load(digest)
        assert not guest.stat(digest).complete
        guest.upload(digest, identity_model)
        guest.load(digest)


def test_the_answer_to_a_request_sent_again_is_the_first_one(own_agent: AgentProcess) -> None:
    with Guest(own_agent.connect()) as guest:
        first = guest.infer("identity", 1.0, request_id=5)
        token = guest.token
    with Guest(own_agent.connect(), token) as guest:
        again = guest.infer("identity", 1.0, request_id=5)
        assert guest.hello.resumed
    assert again == first  # the timing is the same, too: it was not run again


def test_a_new_connection_takes_the_session_over_from_a_dead_one(own_agent: AgentProcess) -> None:
    with Guest(own_agent.connect()) as old, Guest(own_agent.connect(), old.token) as new:
        assert new.hello.resumed
        with pytest.raises(RemoraError):
            old.ping()
        new.ping()


def test_a_clone_forks_its_templates_session_with_its_model(own_agent: AgentProcess, identity_model: bytes) -> None:
    digest = digest_of(identity_model)
    template = own_agent.attach("template", template=True)
    with Guest(own_agent.connect(template)) as guest:
        guest.upload(digest, identity_model)
        guest.load(digest)
        token = guest.token
    own_agent.detach("template", keep_sessions=True)
    own_agent.kill()
    own_agent.start()
    for name in ("clone-1", "clone-2"):
        clone = own_agent.attach(name, parent="template")
        with Guest(own_agent.connect(clone), token) as guest:
            assert guest.hello.forked
            assert not guest.hello.resumed
            assert guest.token != token
            assert struct.unpack("<f", guest.infer(digest, 4.0).outputs[0].data) == (4.0,)
    stranger = own_agent.attach("stranger")
    with Guest(own_agent.connect(stranger), token) as guest:
        assert not guest.hello.forked
    own_agent.detach("template")
    late = own_agent.attach("late", parent="template")
    with Guest(own_agent.connect(late), token) as guest:
        assert not guest.hello.forked


def test_a_second_agent_on_the_same_state_is_told_so(own_agent: AgentProcess, tmp_path: Path) -> None:
    command = own_agent.command()
    command[command.index("--listen") + 1] = f"unix://{tmp_path}/second.sock"
    result = subprocess.run(
        [*command, "--control", f"{tmp_path}/run/second-control.sock"],
        capture_output=True,
        text=True,
        check=False,
        env=own_agent.environment,
    )
    assert result.returncode == 4
    assert f"pid {own_agent.pid}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "second.sock").exists()


@pytest.mark.parametrize("what", ["socket", "file", "port", "directory", "loopback", "config"])
def test_what_stands_in_the_way_of_a_start_is_one_clear_line(
    own_agent: AgentProcess, tmp_path: Path, what: str
) -> None:
    (tmp_path / "other").mkdir()
    other = AgentProcess(tmp_path / "other", models=tmp_path / "none")
    command = other.command()
    listen = command.index("--listen") + 1
    expected = {
        "socket": "another process listens",
        "file": "is not a socket",
        "port": "in use",
        "directory": "does not exist",
        "loopback": "other machines",
        "config": "no key `nonsense`",
    }[what]
    with contextlib.ExitStack() as stack:
        if what == "socket":
            command[listen] = own_agent.address
        elif what == "file":
            other.socket.write_text("precious")
        elif what == "port":
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            command[listen] = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        elif what == "directory":
            command[listen] = f"unix://{tmp_path}/no/such/accel.sock"
        elif what == "loopback":
            command[listen] = "tcp://0.0.0.0:2048"
        else:
            (tmp_path / "other" / "agent.toml").write_text("[limits]\nnonsense = 1\n")
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=other.environment)
    assert result.returncode != 0
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    if what == "file":
        assert other.socket.read_text() == "precious"
    leftovers = list((tmp_path / "other" / "run").glob("*")) if (tmp_path / "other/run").exists() else []
    assert not leftovers


def test_systemd_is_told_when_the_agent_is_ready(tmp_path: Path, models: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify.sock"))
        notify.settimeout(20)
        running = AgentProcess(tmp_path, models=models)
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify.sock")
        try:
            running.start()
        finally:
            del os.environ["NOTIFY_SOCKET"]
        try:
            assert b"READY=1" in notify.recv(1000)
        finally:
            running.stop()


def test_an_agent_stops_on_sigint_with_connections_open(own_agent: AgentProcess) -> None:
    with Guest(own_agent.connect()) as guest:
        guest.ping()
        started_s = time.monotonic()
        assert own_agent.stop(signal.SIGINT) == 0
        assert time.monotonic() - started_s < 5
        assert not own_agent.socket.exists()


def test_tcp_on_loopback_is_a_tenant_of_its_own(tmp_path: Path, models: Path) -> None:
    running = AgentProcess(tmp_path, models=models)
    running.address = "tcp://127.0.0.1:0"
    running.start("--log-format", "json")
    try:
        port = int(running.listening.rpartition(":")[2])
        with Guest(socket.create_connection(("127.0.0.1", port))) as guest:
            guest.infer("identity")
            wait_until(lambda: '"tenant": "tcp"' in running.log, "the session is in the log")
    finally:
        assert running.stop() == 0


def test_an_abstract_socket_knows_its_callers_too(tmp_path: Path, models: Path) -> None:
    running = AgentProcess(tmp_path, models=models)
    name = f"remora-test-{os.getpid()}"
    running.address = f"unix://@{name}"
    running.start()
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"\0{name}")
            with Guest(sock) as guest:
                guest.infer("identity")
        wait_until(lambda: f"tenant=uid:{os.geteuid()}" in running.log, "the session is in the log")
        second = subprocess.run(
            [*running.command()[:-1], str(tmp_path / "none"), "--state", str(tmp_path / "second")],
            capture_output=True,
            text=True,
            check=False,
            env={**running.environment, "REMORA_RUNTIME_DIR": str(tmp_path / "run-2")},
        )
        assert "another process listens" in second.stderr
    finally:
        assert running.stop() == 0
