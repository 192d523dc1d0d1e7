"""One agent for tests that do not disturb each other, and clients of Google's protobuf for both service names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, catalogue_directory, running_agent
from remora.vaccel import config, link
from remora.wire import vaccel
from vaccel_google import GoogleClient

LIMITS = """
[limits]
message_bytes = 16777216
in_flight_bytes_per_tenant = 33554432
request_timeout_s = 60

[workers]
arena_bytes = 134217728
"""
Connect = Callable[..., GoogleClient]


@pytest.fixture(scope="session")
def models() -> Path:
    return catalogue_directory()


@pytest.fixture(scope="session")
def identity(models: Path) -> bytes:
    """A model file that gives its input back: float32 of four dimensions."""
    return (models / "identity" / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("v"), config=LIMITS, models=models) as running:
        yield running


@pytest.fixture
def connect(agent: AgentProcess) -> Iterator[Connect]:
    """Make connections, to any socket of the agent."""
    made = []

    def connect(service: str = vaccel.SYNC_SERVICE, path: Path | None = None) -> GoogleClient:
        sock = agent.connect(path)
        sock.settimeout(30)
        made.append(GoogleClient(sock, service))
        return made[-1]

    yield connect
    for client in made:
        client.close()


@pytest.fixture(params=vaccel.SERVICES)
def client(connect: Connect, request: pytest.FixtureRequest) -> GoogleClient:
    return connect(request.param)


@pytest.fixture
def session(client: GoogleClient) -> int:
    return int(client.call("CreateSession", flags=1).session_id)


@pytest.fixture
def pointed(agent: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentProcess]:
    """Point `remora.vaccel` at the agent."""
    monkeypatch.setenv("VACCEL_RPC_ADDRESS", agent.address)
    link.close()
    yield agent
    config.cleanup()
