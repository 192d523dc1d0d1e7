"""Memory that the agent shares with local clients: who gets it, how much, and what a hostile client can do with it."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent_process import AgentProcess, Guest, running_agent, wait_until
from remora.client import region as regions
from remora.client.address import parse
from remora.client.region import Region
from remora.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
)
from remora.wire import remora_v1 as v1
from remora.wire.ttrpc.core import request_frame

MIB = 1 << 20
CONFIG = f"""
[limits]
shared_bytes_per_connection = {4 * MIB}
shared_bytes_per_tenant = {6 * MIB}
"""
FLOATS = np.arange(1024, dtype="float32").reshape(1, 1, 32, 32)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("a"), config=CONFIG, models=models) as running:
        yield running


@pytest.fixture
def guest(agent: AgentProcess) -> Iterator[Guest]:
    with Guest(agent.connect()) as opened:
        yield opened
    wait_until(lambda: shared_bytes(agent) == 0, "the memory of a connection that is gone is given back")


def share(agent: AgentProcess, token: bytes, size_bytes: int = MIB) -> Region:
    return regions.share(parse(agent.address), token, size_bytes, 10.0)


def shared_bytes(agent: AgentProcess) -> int:
    """Bytes of regions that the agent has mapped."""
    total = 0
    for line in Path(f"/proc/{agent.pid}/maps").read_text().splitlines():
        if "remora-region" in line:
            start, _, end = line.split()[0].partition("-")
            total += int(end, 16) - int(start, 16)
    return total


def request(region: int = 1, offset: int = 0, place: tuple[int, int] = (8192, 4096), **more: object) -> v1.InferRequest:
    """Return a request to hand `FLOATS`, which lie at `offset`, back at `place`."""
    tensor = v1.Tensor(name="input", dtype="float32", shape=list(FLOATS.shape), offset=offset, **more)
    return v1.InferRequest(
        model="identity", inputs=[tensor], region=region, output_offset=place[0], output_bytes=place[1]
    )


def infer(guest: Guest, message: v1.InferRequest) -> v1.InferResponse:
    return guest.call("Infer", message, v1.InferResponse)


def test_a_tensor_goes_through_shared_memory_and_comes_back_in_it(agent: AgentProcess, guest: Guest) -> None:
    assert guest.hello.share_bytes == 4 * MIB
    region = share(agent, guest.token)
    region.memory[:4096] = FLOATS.tobytes()
    answer = infer(guest, request(region.number))
    assert (answer.region, answer.outputs[0].offset, bytes(answer.outputs[0].data)) == (region.number, 8192, b"")
    assert bytes(region.memory[8192 : 8192 + 4096]) == FLOATS.tobytes()


def test_a_tensor_may_lie_anywhere(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    region.memory[12288 : 12288 + 4096] = FLOATS.tobytes()
    for _ in range(2):
        assert infer(guest, request(offset=12288)).region
        assert bytes(region.memory[8192 : 8192 + 4096]) == FLOATS.tobytes()
        region.memory[8192 : 8192 + 4096] = bytes(4096)


def test_nothing_is_written_outside_the_place_for_outputs(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    region.memory[:] = b"\xaa" * region.size_bytes
    region.memory[:4096] = FLOATS.tobytes()
    infer(guest, request())
    assert bytes(region.memory[4096:8192]) == b"\xaa" * 4096
    assert bytes(region.memory[8192 + 4096 :]) == b"\xaa" * (region.size_bytes - 8192 - 4096)


def test_outputs_that_do_not_fit_their_place_come_in_the_answer(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    region.memory[:4096] = FLOATS.tobytes()
    for place in ((0, 0), (8192, 64)):
        answer = infer(guest, request(place=place))
        assert (answer.region, bytes(answer.outputs[0].data)) == (0, FLOATS.tobytes())


@pytest.mark.parametrize(
    ("offset", "place"),
    [
        (MIB - 64, (8192, 4096)),
        (MIB, (8192, 4096)),
        (1 << 63, (8192, 4096)),
        (1, (8192, 4096)),
        (0, (MIB - 64, 4096)),
        (0, (8192, 1 << 63)),
        (0, (8193, 4096)),
        (0, ((1 << 64) - 64, 128)),
    ],
)
def test_a_lie_about_places_is_refused(agent: AgentProcess, guest: Guest, offset: int, place: tuple[int, int]) -> None:
    share(agent, guest.token)
    with pytest.raises(InvalidArgumentError, match="of a region of 1048576 bytes"):
        infer(guest, request(offset=offset, place=place))
    guest.ping()


def test_a_tensor_has_its_bytes_in_one_place_only(agent: AgentProcess, guest: Guest) -> None:
    share(agent, guest.token)
    with pytest.raises(InvalidArgumentError, match="use one of the two"):
        infer(guest, request(data=FLOATS.tobytes()))


@pytest.mark.parametrize("shape", [[1, 1, 32, -32], [1, 1, 1 << 40, 1 << 40]])
def test_an_impossible_shape_is_refused(agent: AgentProcess, guest: Guest, shape: list[int]) -> None:
    share(agent, guest.token)
    message = request()
    message.inputs[0].shape = shape
    with pytest.raises(InvalidArgumentError):
        infer(guest, message)


def test_a_region_is_named_only_on_its_own_connection(agent: AgentProcess, guest: Guest) -> None:
    share(agent, guest.token)
    with Guest(agent.connect()) as other, pytest.raises(FailedPreconditionError, match="no shared memory of number 1"):
        infer(other, request(1))
    with pytest.raises(FailedPreconditionError, match="no shared memory of number 2"):
        infer(guest, request(2))


def test_nobody_can_shrink_or_grow_what_is_shared(agent: AgentProcess, guest: Guest) -> None:
    sizes: list[int] = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(agent.socket))
        fd = receive_fd(sock, guest.token)
        for size in (0, MIB - 4096, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert fcntl.fcntl(fd, 1034) == 0x1 | 0x2 | 0x4  # F_GET_SEALS: seal, shrink, grow
        sizes.append(os.fstat(fd).st_size)
        os.close(fd)
    assert sizes == [MIB]


def receive_fd(sock: socket.socket, token: bytes) -> int:
    message = v1.ShareRequest(token=token, size_bytes=MIB)
    sock.sendall(b"".join(request_frame(1, v1.SERVICE, "Share", message)))
    return socket.recv_fds(sock, 4096, 1)[1][0]


def test_memory_is_bounded_for_a_connection_and_for_a_tenant(agent: AgentProcess, guest: Guest) -> None:
    held = [share(agent, guest.token, 2 * MIB)]
    with pytest.raises(ResourceExhaustedError, match="shared_bytes_per_connection"):
        share(agent, guest.token, 3 * MIB)
    with Guest(agent.connect()) as second, Guest(agent.connect()) as third:
        held.append(share(agent, second.token, 4 * MIB))
        with pytest.raises(ResourceExhaustedError, match="shared_bytes_per_tenant"):
            share(agent, third.token, MIB)
    wait_until(lambda: shared_bytes(agent) == 2 * MIB, "the memory of the second connection is given back")
    held.append(share(agent, guest.token, 2 * MIB))
    assert [region.number for region in held] == [1, 1, 2]


def test_a_region_is_not_smaller_than_is_worth_a_descriptor(agent: AgentProcess, guest: Guest) -> None:
    with pytest.raises(InvalidArgumentError):
        share(agent, guest.token, 4096)


def test_a_wrong_token_shares_nothing(agent: AgentProcess, guest: Guest) -> None:
    for token in (b"", bytes(32)):
        with pytest.raises(FailedPreconditionError):
            share(agent, token)
    assert shared_bytes(agent) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_another_tenant_gets_no_region_with_a_stolen_token(agent: AgentProcess, guest: Guest) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[3].split(':')\n"
        "from remora.client import region; from remora.client.address import parse\n"
        "import remora.client.ready, os; os.setuid(65534)\n"
        "try: region.share(parse(sys.argv[1]), bytes.fromhex(sys.argv[2]), 1 << 20, 10.0)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    os.chmod(agent.directory, 0o755)
    command = [sys.executable, "-c", code, agent.address, guest.token.hex(), ":".join(sys.path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert found.stdout.strip() in ("FailedPreconditionError", "UnavailableError"), found
    assert shared_bytes(agent) == 0


def test_a_guest_behind_a_channel_is_offered_nothing(agent: AgentProcess) -> None:
    path = agent.attach("alice")
    try:
        with Guest(agent.connect(path)) as guest:
            assert guest.hello.share_bytes == 0
            with pytest.raises(FailedPreconditionError):
                regions.share(parse(f"unix://{path}"), guest.token, MIB, 10.0)
    finally:
        agent.detach("alice")


def test_a_client_that_is_killed_leaves_nothing(agent: AgentProcess) -> None:
    code = (
        "import sys, time; import numpy as np, remora\n"
        "session = remora.connect(sys.argv[1])\n"
        "for _ in range(3): kept = session.infer('identity', {'input': np.zeros((1, 1, 256, 256), 'float32')})\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, agent.address], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        assert shared_bytes(agent) > 0
        client.send_signal(signal.SIGKILL)
    wait_until(lambda: shared_bytes(agent) == 0, "the memory of a killed client is given back")


def test_a_worker_that_is_killed_is_given_the_region_again(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    region.memory[:4096] = FLOATS.tobytes()
    assert infer(guest, request()).region
    for pid in workers_of(agent):
        os.kill(pid, signal.SIGKILL)
    region.memory[8192 : 8192 + 4096] = bytes(4096)
    assert infer(guest, request()).region
    assert bytes(region.memory[8192 : 8192 + 4096]) == FLOATS.tobytes()


def workers_of(agent: AgentProcess) -> list[int]:
    import psutil

    found = psutil.Process(agent.pid).children(recursive=True)
    return [one.pid for one in found if "remora-region" in Path(f"/proc/{one.pid}/maps").read_text()]


def test_a_client_that_scribbles_over_a_running_job_spoils_only_its_own(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    with Guest(agent.connect()) as other:
        for round_number in range(20):
            region.memory[:4096] = os.urandom(4096)
            infer(guest, request(place=(64 * round_number, 4096)))  # over its own input, too
            assert other.infer("identity", float(round_number)).outputs[0].dtype == "float32"


def test_a_client_that_takes_pages_away_spoils_only_its_own(agent: AgentProcess, guest: Guest) -> None:
    region = share(agent, guest.token)
    with Guest(agent.connect()) as other:
        for round_number in range(20):
            region._map.madvise(mmap.MADV_REMOVE)  # punches holes: what is read there is zero, and no SIGBUS
            infer(guest, request())
            region._map.madvise(mmap.MADV_REMOVE)
            assert other.infer("identity", float(round_number)).outputs[0].dtype == "float32"


def test_a_session_that_resumes_elsewhere_loses_its_region(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as first:
        share(agent, first.token)
        with Guest(agent.connect(), first.token) as second:
            assert second.hello.resumed
            wait_until(lambda: shared_bytes(agent) == 0, "the first connection's memory is given back")
            with pytest.raises(FailedPreconditionError):
                infer(second, request())
            with pytest.raises(UnavailableError):
                first.ping()


def test_an_agent_out_of_descriptors_refuses_and_goes_on(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        running_agent(tmp_path_factory.mktemp("b"), config=CONFIG, models=models) as agent,
        Guest(agent.connect()) as guest,
    ):
        guest.infer("identity")
        used = {int(name) for name in os.listdir(f"/proc/{agent.pid}/fd")}
        limit = next(number for number in range(4096) if number not in used) + 1  # one is free below it
        most = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (limit, most))
        with pytest.raises(RemoraError):
            share(agent, guest.token)  # its connection takes the last descriptor
        guest.infer("identity", 2.0)
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (most, most))
        assert share(agent, guest.token).size_bytes == MIB
