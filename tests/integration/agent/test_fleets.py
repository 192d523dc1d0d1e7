"""MicroVMs of others, found as they come and let go as they end: Kata's by all its monitors, and plain directories."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from fleets import CRI, Node, connect, cri, listen, served
from handovers import succeed
from remora.errors import PermissionDeniedError, RemoraError, UnauthenticatedError
from remora.wire import control_v1

KINDS = (
    "go-firecracker",
    "go-cloud-hypervisor",
    "rust-firecracker",
    "rust-jailed-firecracker",
    "rust-cloud-hypervisor",
    "dragonball",
    "openvmm",
)
#: Run by hand with more.
COMING_AND_GOING = int(os.environ.get("REMORA_FLEET", "100"))


class FleetAgent(AgentProcess):
    """An agent that finds a node's sandboxes."""

    def __init__(self, directory: Path, node: Node) -> None:
        super().__init__(directory, config=f"{node.config}[workers]\nstandby = 0\n")
        self.fleets = ("--attach", node.attach, "--attach", f"firecracker:{node.root}/fc/*/v.sock")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FleetAgent, Node]]:
    """One agent for all, as each start costs a second: a test leaves the node empty, and the log is its own."""
    node = Node(tmp_path_factory.mktemp("node"))
    agent = FleetAgent(tmp_path_factory.mktemp("a"), node)
    agent.start(*agent.fleets)
    yield agent, node
    assert agent.stop() == 0, agent.log[-3000:]
    assert list(node.root.rglob("*_2048")) == []


@pytest.fixture
def node(running: tuple[FleetAgent, Node]) -> Iterator[Node]:
    node = running[1]
    (node.root / "fc").mkdir()
    yield node
    node.clear()
    shutil.rmtree(node.root / "fc")


@pytest.fixture
def agent(running: tuple[FleetAgent, Node], node: Node) -> Iterator[FleetAgent]:
    agent = running[0]
    os.truncate(agent.log_path, 0)
    yield agent
    node.clear()
    for path in (node.root / "fc").iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    wait_until(lambda: not served(agent), "the node to be empty")
    assert "internal error" not in agent.log, agent.log[-3000:]


def name_of(namespace: str, pod: str, sandbox_id: str) -> str:
    return f"{namespace}.{pod}.{sandbox_id[:8]}"


def descriptors(agent: AgentProcess) -> int:
    return len(os.listdir(f"/proc/{agent.pid}/fd"))


def test_kata_sandboxes_are_found_known_by_their_pod_and_let_go(agent: FleetAgent, node: Node) -> None:
    pods = {
        node.pod("prod", kind, **{"io.remora.tenant": "acme", "io.remora.label.tier": "gold"}): kind for kind in KINDS
    }
    ours = {kind: node.boot(node.path(kind, sandbox_id)) for sandbox_id, kind in pods.items()}
    wait_until(lambda: all(path.exists() for path in ours.values()), "the agent's sockets")
    before = descriptors(agent)
    for sandbox_id, kind in pods.items():
        assert ours[kind].stat().st_mode & 0o777 == 0o600
        name = name_of("prod", kind, sandbox_id)
        with Guest(connect(ours[kind])) as guest:
            guest.ping()
            found = served(agent)[name]
            assert (found.tenant, found.connections, found.sessions) == ("prod.acme", 1, 1)
            labels = {"namespace": "prod", "pod": kind, "uid": f"uid-of-{kind}", "tier": "gold", "fleet": "kata"}
            assert dict(found.labels) == labels
            node.remove(ours[kind].parent)
            wait_until(lambda name=name: name not in served(agent), "the sandbox to be let go")  # type: ignore[misc]
            with pytest.raises(RemoraError):
                guest.ping()
    wait_until(lambda: descriptors(agent) <= before - 2 * len(KINDS), "their descriptors to be closed")


def test_plain_directories_are_served_before_their_monitor_listens(agent: FleetAgent, node: Node) -> None:
    directory = node.root / "fc" / "function-7"
    directory.mkdir(parents=True)
    ours = directory / "v.sock_2048"
    wait_until(ours.exists, "the agent's socket")
    with pytest.raises(UnauthenticatedError, match="no monitor's socket"):
        Guest(connect(ours))
    with listen(directory / "v.sock"), Guest(connect(ours)):
        assert served(agent)["function-7"].sessions == 1
        # What a script does before it starts the monitor again.
    for file in directory.glob("v.sock*"):
        file.unlink()
    wait_until(ours.exists, "another socket")
    with listen(directory / "v.sock"), Guest(connect(ours)):
        assert served(agent)["function-7"].sessions == 2


def test_nobody_but_the_monitor_is_served(agent: FleetAgent, node: Node) -> None:
    sandbox_id = node.pod("prod", "web")
    ours = node.boot(node.path("go-firecracker", sandbox_id))
    wait_until(ours.exists, "the agent's socket")
    script = (
        "import sys; from pathlib import Path; from fleets import connect; from agent_process import Guest\n"
        "try: Guest(connect(Path(sys.argv[1])))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", script, str(ours)], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert told.startswith("UnauthenticatedError"), told
    assert "is not the monitor that listens on" in told
    assert served(agent)[name_of("prod", "web", sandbox_id)].sessions == 0
    with Guest(connect(ours)) as guest:
        guest.ping()


def test_a_monitor_of_another_user_may_connect_and_nobody_else(agent: FleetAgent, node: Node) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    directory = node.root / "fc" / "jailed"
    directory.mkdir(parents=True)
    directory.chmod(0o711)
    ours = directory / "v.sock_2048"
    wait_until(ours.exists, "the agent's socket")
    assert ours.stat().st_uid == 0
    # The jailer gives the directory away a moment after it made it.
    os.chown(directory, 4711, 4711)
    wait_until(lambda: ours.exists() and ours.stat().st_uid == 4711, "the socket to be the monitor's")
    script = (
        "import os, socket, sys\n"
        # Into the directory first: the tests' own, above it, are closed to everybody else.
        "os.chdir(sys.argv[2]); os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))\n"
        "if sys.argv[3] == 'listen':\n"
        "    listener = socket.socket(socket.AF_UNIX); listener.bind('v.sock'); listener.listen()\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect('v.sock_2048')\n"
        # An empty ttrpc request: whoever is served has it answered or refused, and the connection stays open.
        "sock.settimeout(1)\n"
        "try: print('closed' if not sock.recv(1) else 'answered')\n"
        "except TimeoutError: print('open')\n"
    )

    def run(uid: int, how: str) -> str:
        argv = [sys.executable, "-c", script, str(uid), str(directory), how]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    assert "PermissionError" in run(4712, "")
    assert run(4711, "listen") == "open"


def test_symlinks_and_directories_of_others_are_refused_and_nothing_is_made_in_them(
    agent: FleetAgent, node: Node
) -> None:
    elsewhere = node.root / "elsewhere" / "root"
    elsewhere.mkdir(parents=True)
    linked, open_to_all = node.pod("prod", "linked"), node.pod("prod", "open")
    firecracker = node.root / "run/vc/firecracker"
    (firecracker / linked[:32]).mkdir(parents=True)
    with listen(elsewhere / "kata.hvsock"):
        (firecracker / linked[:32] / "root").symlink_to(elsewhere)
        path = node.path("go-cloud-hypervisor", open_to_all)
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o777)
        node.boot(path)
        (node.root / "fc" / "link").symlink_to(elsewhere)
        wait_until(lambda: agent.log.count("sandbox not served") >= 2, "refusals")
    assert "symlinks are not followed" in agent.log
    assert "everyone may write to" in agent.log
    assert served(agent) == {}
    assert [path.name for path in elsewhere.iterdir()] == ["kata.hvsock"]
    assert agent.log.count("sandbox not served") == 2, "told once each"
    path.parent.chmod(0o750)
    wait_until(lambda: served(agent), "the sandbox that was put right")


def test_no_annotation_of_a_pods_author_makes_it_another_sandbox(agent: FleetAgent, node: Node) -> None:
    victim = node.pod("prod", "bank")
    forged = "f" * 64
    # Another container's bundle with the victim's annotations; a pod of another namespace of containerd; no pod.
    node.bundle(forged, {**cri(victim, "prod", "bank")})
    container = "c" * 64
    node.bundle(container, {**cri(container, "prod", "bank"), "io.kubernetes.cri.container-type": "container"})
    foreign = "d" * 64
    node.bundle(foreign, cri(foreign, "prod", "bank"), namespace="evil")
    plain = "e" * 64
    node.bundle(plain, {"nerdctl/name": "mine", "io.remora.label.namespace": "prod"}, namespace="default")
    for sandbox_id in (victim, forged, container, foreign, plain):
        node.boot(node.path("go-cloud-hypervisor", sandbox_id))
    wait_until(lambda: len(served(agent)) == 2, "the two that are who they are")
    assert set(served(agent)) == {name_of("prod", "bank", victim), "ctr.mine.eeeeeeee"}
    assert dict(served(agent)["ctr.mine.eeeeeeee"].labels) == {"fleet": "kata"}
    wait_until(lambda: agent.log.count("containerd knows no such sandbox") == 3, "the others to be told of")


def test_two_sandboxes_that_begin_alike_are_both_kept_out(agent: FleetAgent, node: Node) -> None:
    one = node.pod("prod", "one")
    twin = one[:32] + "0" * 32
    node.bundle(twin, cri(twin, "prod", "two"))
    node.boot(node.path("go-firecracker", one))
    wait_until(lambda: "sandbox not served" in agent.log, "a line that says so")
    assert served(agent) == {}


def test_qemu_sandboxes_are_known_by_the_cid_that_their_shim_tells(agent: FleetAgent, node: Node) -> None:
    first, second = node.pod("prod", "q1"), node.pod("prod", "q2")
    node.shim("run/vc/sbs", first, lambda: b"vsock://70001:1024")
    told = iter([b"", b"vsock://70002:1024"])
    node.shim("run/kata", second, lambda: next(told))
    names = name_of("prod", "q1", first), name_of("prod", "q2", second)
    wait_until(lambda: len(served(agent)) == 2, "both sandboxes")
    assert {name: one.cid for name, one in served(agent).items()} == dict(zip(names, (70001, 70002), strict=True))
    node.remove(node.root / "run/vc/sbs" / first)
    wait_until(lambda: set(served(agent)) == {names[1]}, "the first to be let go")


def test_a_monitor_made_before_its_sandbox_is_found_through_the_shim(agent: FleetAgent, node: Node) -> None:
    sandbox_id = node.pod("prod", "templated")
    path = node.path("go-cloud-hypervisor", "4f1c7d9e-cached-vm")
    ours = node.boot(path)
    node.shim("run/vc/sbs", sandbox_id, lambda: f"hvsock://{path}:1024".encode())
    wait_until(ours.exists, "the agent's socket")
    with Guest(connect(ours)):
        assert served(agent)[name_of("prod", "templated", sandbox_id)].sessions == 1


def test_a_shim_that_never_answers_keeps_nobody_waiting_for_long(agent: FleetAgent, node: Node) -> None:
    hung = threading.Event()
    node.shim("run/vc/sbs", node.pod("prod", "hung"), lambda: b"" * hung.wait(60))
    node.boot(node.path("go-firecracker", node.pod("prod", "well")))
    wait_until(lambda: len(served(agent)) == 1, "the other one")
    hung.set()


def test_sessions_go_on_after_the_agent_was_killed_and_those_of_gone_sandboxes_end(
    agent: FleetAgent, node: Node
) -> None:
    kept, lost = node.pod("prod", "kept"), node.pod("prod", "lost")
    paths = [node.path("rust-jailed-firecracker", sandbox_id) for sandbox_id in (kept, lost)]
    ours, theirs = (node.boot(path) for path in paths)
    wait_until(lambda: ours.exists() and theirs.exists(), "both sockets")
    with Guest(connect(ours)) as guest, Guest(connect(theirs)):
        token = guest.token
    agent.kill()
    assert ours.exists()
    node.remove(paths[1].parent)
    agent.start(*agent.fleets)
    with Guest(connect(ours), token) as guest:
        assert guest.hello.resumed
        assert set(served(agent)) == {name_of("prod", "kept", kept)}
    sessions = [name for name, one in served(agent).items() for _ in range(one.sessions)]
    assert sessions == [name_of("prod", "kept", kept)]
    assert f'sandbox={name_of("prod", "lost", lost)} reason="its microVM has gone"' in agent.log
    # Without the fleet its sessions end, and so do the sockets.
    agent.kill()
    agent.start()
    assert served(agent) == {}
    node.remove(paths[0].parent)
    agent.stop()
    agent.start(*agent.fleets)


def test_a_successor_takes_the_sockets_of_found_sandboxes(agent: FleetAgent, node: Node) -> None:
    ours = node.boot(node.path("rust-jailed-firecracker", node.pod("prod", "moved")))
    wait_until(ours.exists, "the agent's socket")
    inode = ours.stat().st_ino
    with Guest(connect(ours)) as guest:
        token = guest.token
    succeed(agent, *agent.fleets)
    assert ours.stat().st_ino == inode
    with Guest(connect(ours), token) as guest:
        assert guest.hello.resumed


def test_a_hundred_that_come_and_go_are_served_and_leave_nothing(agent: FleetAgent, node: Node) -> None:
    before = descriptors(agent)
    directories = []
    for number in range(COMING_AND_GOING):
        kind = KINDS[number % len(KINDS)]
        path = node.path(kind, node.pod("many", f"p{number}"))
        ours = node.boot(path)
        directories.append(path.parent)
        if number % 3 == 0:  # gone before or after it was seen
            node.remove(directories.pop())
        elif number % 10 == 1:
            wait_until(ours.exists, "the agent's socket")
            with Guest(connect(ours)) as guest:
                guest.ping()
        if number == COMING_AND_GOING // 2:
            agent.kill()
            agent.start(*agent.fleets)
    wait_until(lambda: len(served(agent)) == len(directories), "all that are there")
    for directory in directories:
        node.remove(directory)
    wait_until(lambda: not served(agent), "all to be let go")
    wait_until(lambda: descriptors(agent) <= before, "their descriptors to be closed")


def test_a_found_sandbox_that_the_operator_detaches_stays_detached(agent: FleetAgent, node: Node) -> None:
    one, other = node.pod("prod", "one"), node.pod("prod", "other")
    ours = node.boot(node.path("go-firecracker", one))
    wait_until(ours.exists, "the agent's socket")
    agent.detach(name_of("prod", "one", one))
    assert not ours.exists()
    second = node.boot(node.path("go-firecracker", other))
    wait_until(second.exists, "a later one")
    assert set(served(agent)) == {name_of("prod", "other", other)}
    assert not ours.exists()


def test_rules_for_a_namespace_apply_to_kata_pods(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    rules = '[[label]]\nmatch = { namespace = "poor" }\noperations = []\n'
    (tmp_path / "b").mkdir()
    agent = AgentProcess(
        tmp_path / "b", config=f"{node.config}attach = ['{node.attach}']\n{rules}", models=catalogue_directory()
    )
    agent.start()
    try:
        sockets = [node.boot(node.path("go-firecracker", node.pod(name, "p"))) for name in ("poor", "rich")]
        wait_until(lambda: all(path.exists() for path in sockets), "both sockets")
        with Guest(connect(sockets[1])) as guest:
            guest.infer("identity")
        with Guest(connect(sockets[0])) as guest, pytest.raises(PermissionDeniedError):
            guest.infer("identity")
    finally:
        node.close()
        assert agent.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("fleet", ["firecracker:/srv/fc/v.sock", "qemu"])
def test_a_fleet_that_could_not_be_found_is_refused_with_the_forms(tmp_path: Path, fleet: str) -> None:
    agent = AgentProcess(tmp_path)
    done = subprocess.run(
        agent.command("--attach", fleet), capture_output=True, text=True, env=agent.environment, check=False
    )
    assert done.returncode == 2
    assert "firecracker:/srv/fc/*/v.sock" in done.stderr or "/srv/fc/*/v.sock" in done.stderr


def test_a_stray_listener_beside_a_monitor_is_told_of_and_left_alone(agent: FleetAgent, node: Node) -> None:
    path = node.path("go-firecracker", node.pod("prod", "taken"))
    path.parent.mkdir(parents=True)
    with listen(path.with_name("kata.hvsock_2048")) as other:
        node.boot(path)
        wait_until(lambda: "another process listens on" in agent.log, "a line that says so")
        other.settimeout(1)
        with connect(path.with_name("kata.hvsock_2048")):
            other.accept()[0].close()
    wait_until(lambda: served(agent), "it to be served, as the other has ended")


def container_of(node: Node, sandbox_id: str, **annotations: str) -> None:
    """Write the bundle of a container, as containerd does before its runtime is asked for it."""
    described = {f"{CRI}container-type": "container", f"{CRI}sandbox-id": sandbox_id, **annotations}
    node.bundle(uuid.uuid4().hex * 2, described)


def state_grant(agent: AgentProcess, number: int) -> str:
    grant = control_v1.GrantRequest(id=f"{number:032x}", kind="gpu", shares=[f"gpu0-{number}"], shares_per_device=10)
    agent.ask("Grant", grant, control_v1.Empty)
    return grant.id


def test_containers_bring_the_kubelets_grants_and_pods_authors_none(agent: FleetAgent, node: Node) -> None:
    first, second, stolen = (state_grant(agent, number) for number in range(3))
    # A containerd that passes whatever a pod's author writes, into the sandbox and into its containers.
    forger = node.pod("prod", "forger", **{"grant.remora.dev/gpu": stolen})
    container_of(node, forger, **{"grant.remora.dev/gpu": stolen})
    sandbox_id = node.pod("prod", "web")
    container_of(node, sandbox_id, **{"grant.remora.dev/gpu": first})
    for each in (forger, sandbox_id):
        node.boot(node.path("go-firecracker", each))

    def granted(pod: str, each: str) -> list[int]:
        found = served(agent).get(name_of("prod", pod, each))
        return [one.shares for one in found.grants] if found is not None else []

    wait_until(lambda: granted("web", sandbox_id) == [1], "the first container's grant")
    container_of(node, sandbox_id, **{"grant.remora.dev/gpu": second})
    wait_until(lambda: granted("web", sandbox_id) == [2], "the second one's, too")
    assert granted("forger", forger) == []
