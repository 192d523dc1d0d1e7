"""TLS: callers known by their certificates, from both SDKs and a stock client, and hostile ones."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import socket
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import remora
import remora.aio
from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from authority import Authority
from handovers import Caller, number_tensor, succeed
from remora.client.tensors import Tensor
from remora.errors import PermissionDeniedError, RemoraError, UnauthenticatedError, UnavailableError

CONFIG = """
[limits]
handshakes = 8
handshake_timeout_s = 1
[tenant."cn:barred"]
models = ["efficientnet-*"]
"""


@dataclass
class Node:
    agent: AgentProcess
    authority: Authority
    url: str
    oip_url: str
    files: list[str]

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("tls://").partition(":")
        return host, int(port)

    @property
    def oip_place(self) -> tuple[str, int]:
        host, _, port = self.oip_url.removeprefix("oip+tls://").partition(":")
        return host, int(port)

    def context(self, name: str = "", authority: Authority | None = None, days: int = 1) -> ssl.SSLContext:
        """Return a client's context, with a certificate if it has a name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.authority.certificate)
        if name:
            context.load_cert_chain(*(authority or self.authority).issue(name, days=days))
        return context


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory / "ca")
    files = authority.files()
    agent = AgentProcess(directory, config=CONFIG, models=catalogue_directory())
    options = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--tls-ca", str(files.authorities)]
    options += ["--listen", "tls://127.0.0.1:0", "--listen", "oip+tls://127.0.0.1:0"]
    agent.start(*options)
    url, oip_url = agent.listening.split()[1:]
    yield Node(agent, authority, url, oip_url, options)
    assert agent.stop() == 0, agent.log[-3000:]
    assert "internal error" not in agent.log, agent.log[-3000:]


def ask(session: remora.Session, value: float) -> float:
    answer = session.infer("identity", {"input": number_tensor(value)}, arrays=False)
    return float(struct.unpack("<f", bytes(next(iter(answer.values())).data))[0])


# -- callers with a certificate ---------------------------------------------------------------------------------------


def test_a_certificate_is_an_identity(node: Node) -> None:
    with remora.connect(node.url + node.authority.query("web")) as session:
        assert ask(session, 7.0) == 7.0
    wait_until(lambda: "tenant=cn:web" in node.agent.log, "the log line")
    spiffe = node.authority.query("pod", alternative="URI:spiffe://prod/ns/a/sa/web")
    with remora.connect(node.url + spiffe) as session:
        assert ask(session, 8.0) == 8.0
    wait_until(lambda: "tenant=spiffe://prod/ns/a/sa/web" in node.agent.log.replace('"', ""), "the log line")
    with (
        remora.connect(node.url + node.authority.query("barred")) as session,
        pytest.raises(PermissionDeniedError, match="cn:barred"),
    ):
        ask(session, 1.0)


def test_large_messages_pass_both_ways_and_by_asyncio_too(node: Node) -> None:
    query = node.authority.query("large")
    image = Tensor(bytes(602112), "float32", [1, 3, 224, 224])
    with remora.connect(node.url + query) as session:
        results = [session.infer("efficientnet-lite0", {"input": image}, arrays=False) for _ in range(3)]
        assert len({bytes(next(iter(result.values())).data) for result in results}) == 1
        failed: list[BaseException] = []

        def many() -> None:
            try:
                for value in range(50):
                    assert ask(session, float(value)) == float(value)
            except BaseException as error:  # noqa: BLE001 - handed to the test
                failed.append(error)

        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failed == []

    async def twin() -> bytes:
        async with remora.aio.connect(node.url + query) as session:
            result = await session.infer("efficientnet-lite0", {"input": image}, arrays=False)
            return bytes(next(iter(result.values())).data)

    assert asyncio.run(twin()) == bytes(next(iter(results[0].values())).data)


def test_the_environment_names_the_files(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = node.authority.issue("environment")
    monkeypatch.setenv("REMORA_ADDRESS", node.url)
    monkeypatch.setenv("REMORA_TLS_CA", str(node.authority.certificate))
    monkeypatch.setenv("REMORA_TLS_CERT", str(certificate))
    monkeypatch.setenv("REMORA_TLS_KEY", str(key))
    with remora.connect() as session:
        assert ask(session, 3.0) == 3.0


def test_a_stock_http_client_speaks_to_the_door_over_tls(node: Node) -> None:
    plain = socket.create_connection(node.oip_place, timeout=10)
    with node.context("http").wrap_socket(plain, server_hostname="localhost") as sock:
        body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1, 1, 1], "data": [7.0]}]}
        data = json.dumps(body).encode()
        head = f"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + data)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert b"7.0" in answer


def test_a_fork_leaves_the_parents_connection_alone(node: Node) -> None:
    with remora.connect(node.url + node.authority.query("fork")) as session:
        assert ask(session, 1.0) == 1.0
        pid = os.fork()
        if not pid:
            try:
                os._exit(0 if ask(session, 2.0) == 2.0 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
        assert ask(session, 3.0) == 3.0


# -- who is not let in ------------------------------------------------------------------------------------------------


def test_another_identity_cannot_take_a_session_by_its_token(node: Node) -> None:
    with tls_guest(node, "owner") as owner:
        token, session = owner.token, owner.hello.session_id
        with tls_guest(node, "thief", token) as thief:
            assert not thief.hello.resumed
            assert thief.hello.session_id != session
        owner.ping()
    with tls_guest(node, "owner", token) as again:
        assert again.hello.resumed


def tls_guest(node: Node, name: str, token: bytes = b"") -> Guest:
    from remora.client import address, transport

    return Guest(transport.open_socket(address.parse(node.url + node.authority.query(name)), 10.0), token)


@pytest.mark.parametrize("client", ["blocking", "asyncio"])
def test_a_client_without_an_acceptable_certificate_is_told_so(node: Node, tmp_path: Path, client: str) -> None:
    def connect(query: str) -> None:
        if client == "blocking":
            remora.connect(node.url + query).close()
            return

        async def twin() -> None:
            async with remora.aio.connect(node.url + query):
                pass

        asyncio.run(twin())

    stranger, key = Authority(tmp_path / "other").issue("web")
    expired, expired_key = node.authority.issue("expired", days=-1)
    trusted = f"?ca={node.authority.certificate}"
    for query in (trusted, f"{trusted}&cert={stranger}&key={key}", f"{trusted}&cert={expired}&key={expired_key}"):
        with pytest.raises(UnauthenticatedError, match="does not accept this client"):
            connect(query)
    nameless, nameless_key = node.authority.issue("nameless", subject="/O=somebody")
    with pytest.raises(RemoraError, match="0 common names"):
        connect(f"{trusted}&cert={nameless}&key={nameless_key}")


def test_an_agent_that_is_not_the_one_meant_is_not_talked_to(node: Node, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    certificate, key = node.authority.issue("client")
    own = f"&cert={certificate}&key={key}"
    for query in (
        f"?ca={other.certificate}{own}",
        f"?ca={node.authority.certificate}{own}&name=elsewhere.example",
        f"?ca={node.authority.certificate}{own}&name=spiffe://prod/agent",
    ):
        with pytest.raises(UnauthenticatedError, match="not the agent that is meant"):
            remora.connect(node.url + query)


def test_old_tls_and_no_tls_are_refused(node: Node) -> None:
    old = node.context("old")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(node.place, timeout=10) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname="localhost")
    with socket.create_connection(node.place, timeout=10) as plain:
        plain.sendall(b"\0\0\0\1\0\0\0\1\1\0x")
        assert not until_end(plain).startswith(b"\0")
    with socket.create_connection(node.place, timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in until_end(plain)
    with socket.create_connection(node.place, timeout=10) as plain:
        plain.sendall(os.urandom(4096))
        until_end(plain)
    with remora.connect(node.url + node.authority.query("after")) as session:
        assert ask(session, 1.0) == 1.0


def until_end(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_tls_to_a_plain_port_is_an_error_in_words(node: Node, tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, config="[limits]\nframe_timeout_s = 1\n", models=catalogue_directory())
    agent.start("--listen", "tcp://127.0.0.1:0")
    try:
        place = agent.listening.split()[1].removeprefix("tcp://")
        with pytest.raises(UnavailableError, match="no TLS connection"):
            remora.connect(f"tls://{place}{node.authority.query('plain')}", timeout_s=3.0)
        with Guest(agent.connect()) as guest:
            guest.ping()
    finally:
        assert agent.stop() == 0, agent.log


def test_slow_handshakes_end_in_time_and_keep_nobody_out(node: Node) -> None:
    slow = [socket.create_connection(node.place, timeout=10) for _ in range(40)]
    try:
        for sock in slow:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        with remora.connect(node.url + node.authority.query("quick")) as session:
            assert ask(session, 5.0) == 5.0
        for sock in slow:
            until_end(sock)  # ends within the socket's own timeout
    finally:
        for sock in slow:
            sock.close()
    wait_until(lambda: "too many handshakes (limits.handshakes)" in node.agent.log, "the log names the limit")


def test_a_flood_of_key_updates_holds_up_nobody(node: Node, tmp_path: Path) -> None:
    """TLS 1.3 has no renegotiation; what is left of it is KeyUpdate, which `openssl s_client` sends for each line K."""
    certificate, key = node.authority.issue("flood")
    host, port = node.place
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-cert", str(certificate), "-key", str(key)]
    command += ["-CAfile", str(node.authority.certificate), "-tls1_3"]
    master, terminal = pty.openpty()  # a terminal gives it one line at a time
    modes = termios.tcgetattr(terminal)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    log = tmp_path / "client.log"
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            if select.select([], [master], [], 0.05)[1]:
                os.write(master, b"K\n")

    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=terminal, stdout=subprocess.DEVNULL, stderr=output) as client,
    ):
        thread = threading.Thread(target=flood)
        thread.start()
        try:
            wait_until(lambda: log.read_bytes().count(b"KEYUPDATE") > 100, "the flood")
            with remora.connect(node.url + node.authority.query("beside")) as session:
                for value in range(50):
                    assert ask(session, float(value)) == float(value)
            assert client.poll() is None
        finally:
            stop.set()
            thread.join(10)
            client.kill()
    os.close(master)
    os.close(terminal)


def test_a_client_that_does_not_read_costs_only_itself(node: Node) -> None:
    context = node.context("deaf")
    plain = socket.create_connection(node.oip_place, timeout=10)
    with context.wrap_socket(plain, server_hostname="localhost") as sock:
        sock.settimeout(1.0)
        request = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
        sent = 0
        try:
            while sent < 64 << 20:
                sent += sock.send(request)
        except TimeoutError:
            pass
        assert sent < 64 << 20, "the agent took everything, though nothing was read of its answers"
        with remora.connect(node.url + node.authority.query("other")) as session:
            assert ask(session, 1.0) == 1.0


# -- keeping on -------------------------------------------------------------------------------------------------------


def test_new_certificates_are_read_on_sighup_and_bad_ones_are_not(node: Node) -> None:
    key = Path(node.files[3])
    saved = key.read_bytes()
    key.write_text("nothing")
    os.kill(node.agent.pid, signal.SIGHUP)
    wait_until(lambda: "certificates refused" in node.agent.log, "the bad key is refused")
    with remora.connect(node.url + node.authority.query("still")) as session:
        assert ask(session, 1.0) == 1.0
    key.write_bytes(saved)
    node.authority.files()  # another certificate and key in the same files
    os.kill(node.agent.pid, signal.SIGHUP)
    wait_until(lambda: "certificates reloaded" in node.agent.log, "the new ones are read")
    with remora.connect(node.url + node.authority.query("anew")) as session:
        assert ask(session, 1.0) == 1.0


def test_a_revoked_certificate_ends_its_connection_and_gets_no_other(node: Node) -> None:
    authorities = node.authority.certificate
    saved = authorities.read_text()
    leaver, stayer = node.url + node.authority.query("leaver"), node.url + node.authority.query("stayer")
    with remora.connect(leaver, reconnect_s=0.5) as leaving, remora.connect(stayer) as staying:
        assert ask(leaving, 1.0) == ask(staying, 1.0) == 1.0
        authorities.write_text(saved + node.authority.revoke("leaver"))
        reloads = node.agent.log.count("certificates reloaded")
        try:
            os.kill(node.agent.pid, signal.SIGHUP)
            wait_until(lambda: node.agent.log.count("certificates reloaded") > reloads, "the list is read")
            with pytest.raises(RemoraError):
                ask(leaving, 2.0)
            assert ask(staying, 2.0) == 2.0, "it comes back by itself"
            with pytest.raises(RemoraError, match="revoked"):
                remora.connect(leaver, reconnect_s=0.5).close()
            wait_until(lambda: "certificate revoked" in node.agent.log, "the operator reads why")
        finally:
            authorities.write_text(saved)
            os.kill(node.agent.pid, signal.SIGHUP)
    wait_until(lambda: node.agent.log.count("certificates reloaded") > reloads + 1, "the list is gone")
    with remora.connect(leaver) as session:
        assert ask(session, 3.0) == 3.0


def test_a_successor_takes_tls_over_too(node: Node) -> None:
    caller = Caller(node.url + node.authority.query("handed"))
    stop = threading.Event()
    thread = threading.Thread(target=caller.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: caller.answers or caller.wrong, "the first answer")
        succeed(node.agent, *node.files)
        before = caller.answers
        wait_until(lambda: caller.answers > before + 5 or caller.wrong, "answers of the successor")
    finally:
        stop.set()
        thread.join(30)
    assert caller.wrong == []
    assert len(caller.sessions) == 1


def test_no_memory_is_shared_with_another_machine(node: Node) -> None:
    """Behind TLS the doors see a Unix socket, and such clients are offered shared memory otherwise."""
    with tls_guest(node, "far") as guest, Guest(node.agent.connect()) as local:
        assert local.hello.share_bytes > 0
        assert guest.hello.share_bytes == 0
