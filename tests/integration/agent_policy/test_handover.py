"""A new agent takes over from a running one: nobody is refused, no answer is lost or wrong, and sessions go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from handovers import Caller, succeed
from remora.agent import handover
from remora.agent.handover import Predecessor
from remora.errors import FailedPreconditionError, UnavailableError
from remora.wire import control_v1, remora_v1
from remora.wire.ttrpc.sync import Client

#: Run by hand with 20; each takes about a second.
HANDOVERS = int(os.environ.get("REMORA_HANDOVERS", "4"))


PICTURE = remora_v1.InferRequest(
    model="efficientnet-lite0",
    inputs=[remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=bytes(602112))],
)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    running = AgentProcess(tmp_path, models=catalogue_directory())
    running.start()
    yield running
    assert running.stop() == 0, running.log[-3000:]
    assert "internal error" not in running.log, running.log[-3000:]
    assert not running.socket.exists()
    assert not running.control.exists()
    assert list((tmp_path / "run").glob("*.next")) == []


@contextmanager
def calling(callers: list[Caller]) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=caller.run, args=(stop,)) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(caller.answers or caller.wrong for caller in callers), "the first answers")
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_no_connection_is_refused_and_no_answer_is_lost_or_wrong(agent: AgentProcess) -> None:
    sandbox = agent.attach("web", tenant="acme")
    steady = [Caller(agent.address) for _ in range(3)]
    fresh = [Caller(agent.address, fresh=True) for _ in range(2)]
    guest = Caller(f"unix://{sandbox}")
    callers = [*steady, *fresh, guest]
    took_s = []
    with calling(callers):
        for _ in range(HANDOVERS):
            before = [caller.answers for caller in callers]
            began_s = time.monotonic()
            succeed(agent)
            took_s.append(time.monotonic() - began_s)
            for caller, answers in zip(callers, before, strict=True):
                wait_until(lambda c=caller, n=answers: c.answers > n + 2 or c.wrong, "answers after it")  # type: ignore[misc]
    print(
        f"\n{HANDOVERS} handovers, {sum(caller.answers for caller in callers)} answers, the longest took "
        f"{max(caller.longest_s for caller in callers) * 1e3:.0f} ms; a handover {max(took_s):.2f} s at most"
    )
    assert [wrong for caller in callers for wrong in caller.wrong] == []
    assert agent.log.count("agent succeeds another") == HANDOVERS
    for caller in (*steady, guest):
        assert len(caller.sessions) == 1, "the session did not go on"
    status = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
    assert status.pid == agent.pid


def test_a_raw_connection_in_a_loop_is_never_refused(agent: AgentProcess) -> None:
    stop = threading.Event()
    refused: list[OSError] = []
    made = 0

    def connect() -> None:
        nonlocal made
        while not stop.is_set():
            try:
                sock = agent.connect()
            except OSError as error:
                refused.append(error)
                continue
            try:
                Guest(sock).close()
                made += 1
            except UnavailableError:
                pass  # accepted by the old one just before it ended: the SDK would connect again

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        for _ in range(2):
            succeed(agent)
    finally:
        stop.set()
        thread.join(30)
    assert refused == []
    assert made > 100


def test_a_successor_that_dies_leaves_the_agent_as_it_was(agent: AgentProcess) -> None:
    predecessor = Predecessor.find(agent.control, agent.state)
    assert predecessor is not None
    sockets = predecessor.sockets()
    assert f"unix://{agent.socket}" in [address.text for address in sockets.addresses()]
    answered: list[bool] = []
    with Guest(agent.connect()) as guest, Client(agent.connect(agent.control)) as client:
        guest.call("Infer", PICTURE, remora_v1.InferResponse)

        def work() -> None:
            guest.call("Infer", PICTURE, remora_v1.InferResponse)
            answered.append(True)

        threads = [threading.Thread(target=work) for _ in range(100)]
        for thread in threads:
            thread.start()
        wait_until(lambda: answered, "the first answer")
        drain = threading.Thread(target=drain_for_a_successor, args=(client,))
        drain.start()
        wait_until(lambda: "agent draining" in agent.log, "the drain begins")
        waiting = agent.connect()  # in the queue: nobody accepts now
        client.close()
        with Guest(waiting) as late:
            late.infer("identity")
        assert "drain abandoned" in agent.log
        for thread in [*threads, drain]:
            thread.join(30)
    assert len(answered) == 100, "what was under way is answered all the same"
    predecessor.close()
    sockets.kept = True  # their files are the agent's
    sockets.close()
    with Guest(agent.connect()) as guest:
        guest.infer("identity")


def drain_for_a_successor(client: Client) -> None:
    request = control_v1.DrainRequest(timeout_s=20, successor=True)
    with pytest.raises(UnavailableError):
        client.call(control_v1.SERVICE, "Drain", request, control_v1.DrainResponse, timeout_s=20)


def test_another_state_directory_is_no_succession(agent: AgentProcess) -> None:
    predecessor = Predecessor.find(agent.control, agent.directory / "other")
    assert predecessor is not None
    with closing(predecessor), pytest.raises(FailedPreconditionError, match=str(agent.state)):
        predecessor.sockets()
    with pytest.raises(UnavailableError, match="does not listen"):
        handover.send(str(agent.directory / "none"), [])
    with Guest(agent.connect()) as guest:
        guest.ping()


def test_taking_over_from_nobody_is_a_start(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    agent.start("--takeover")
    with Guest(agent.connect()) as guest:
        guest.ping()
    assert agent.stop() == 0


def test_a_stock_http_client_is_told_to_connect_anew(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    door = tmp_path / "oip.sock"
    agent.start("--listen", f"oip+unix://{door}")
    try:
        with agent.connect(door) as sock:
            sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"Connection: keep-alive" in sock.recv(4096)
            sock.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 174\r\n\r\n{")
            old = agent.release()
            starting = threading.Thread(target=agent.start, args=("--takeover", "--listen", f"oip+unix://{door}"))
            starting.start()
            wait_until(lambda: "agent draining" in agent.log, "the drain begins")
            body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1, 1, 1], "data": [7.0]}]}
            sock.sendall(json.dumps(body).encode()[1:].ljust(173))
            answer = b""
            while part := sock.recv(4096):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert b"Connection: close" in answer
            assert b"7.0" in answer
        starting.join(30)
        assert old.wait(10) == 0
        with agent.connect(door) as sock:
            sock.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"200" in sock.recv(4096)
    finally:
        assert agent.stop() == 0


def test_a_stock_grpc_client_in_a_loop_notices_nothing(tmp_path: Path) -> None:
    """GOAWAY tells it which calls nobody looked at; it makes those again on another connection."""
    numpy = pytest.importorskip("numpy")
    grpc = pytest.importorskip("tritonclient.grpc")
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    door = ["--listen", f"oip+unix://{tmp_path}/oip.sock"]
    agent.start(*door)
    stop = threading.Event()
    answers: list[bool] = []
    errors: list[Exception] = []

    def work() -> None:
        client = grpc.InferenceServerClient(f"unix:{tmp_path}/oip.sock")
        while not stop.is_set():
            value = float(len(answers) % 1000)
            given = grpc.InferInput("input", [1, 1, 1, 1], "FP32")
            given.set_data_from_numpy(numpy.full((1, 1, 1, 1), value, numpy.float32))
            try:
                result = client.infer("identity", [given])
                answers.append(result.as_numpy(result.get_response().outputs[0].name).item() == value)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(max(2, HANDOVERS // 2)):
            before = len(answers)
            wait_until(lambda n=before: len(answers) > n + 5 or errors, "answers")  # type: ignore[misc]
            succeed(agent, *door)
    finally:
        stop.set()
        thread.join(30)
        assert agent.stop() == 0, agent.log[-3000:]
    assert errors == []
    assert all(answers)


# -- socket activation ------------------------------------------------------------------------------------------------


def test_sockets_of_systemd_are_served_and_outlive_the_agent(tmp_path: Path) -> None:
    """As systemd does it: the sockets are open before the agent and stay open when it ends."""
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    oip = tmp_path / "oip.sock"
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(agent.socket))
        second.bind(str(oip))
        for sock in (first, second):
            sock.listen()
        early = agent.connect()  # before there is an agent at all
        processes = [activated(agent, [first, second], ["remora-agent.socket", "oip"])]
        try:
            with Guest(early) as guest:
                guest.infer("identity")
                token = guest.token
                processes[0].send_signal(signal.SIGTERM)
                assert processes[0].wait(30) == 0, agent.log
            assert agent.socket.exists()
            between = agent.connect()  # nobody is there: it waits
            processes.append(activated(agent, [first, second], ["remora-agent.socket", "oip"]))
            with Guest(between, token) as guest:
                assert guest.hello.resumed
                guest.infer("identity")
            with agent.connect(oip) as sock:
                sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert b"200" in sock.recv(4096)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    assert process.wait(30) == 0, agent.log
        assert "internal error" not in agent.log
        assert not agent.control.exists()


_ACTIVATE = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for index, fd in enumerate(os.dup(fd) for fd in fds):
    os.dup2(fd, 100 + index)
for index in range(len(fds)):
    os.dup2(100 + index, 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


def activated(agent: AgentProcess, sockets: list[socket.socket], names: list[str]) -> subprocess.Popen[bytes]:
    """Start an agent with open sockets, as systemd does."""
    command = agent.command()
    at = command.index("--listen")
    arguments = [*command[1:at], *command[at + 2 :]]
    fds = [sock.fileno() for sock in sockets]
    with agent.log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _ACTIVATE, ",".join(map(str, fds)), ":".join(names), *arguments],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=agent.environment,
        )
