"""Shared agents: starting one costs a second, so tests that do not disturb each other share one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, catalogue_directory, running_agent

#: Small limits, so that tests reach them quickly.
LIMITS = """
[limits]
connections = 1500
connections_per_tenant = 1200
sessions_per_tenant = 1100
message_bytes = 8388608
in_flight_bytes_per_tenant = 16777216
frame_timeout_s = 1
hello_timeout_s = 3
request_timeout_s = 60

[store]
tenant_bytes = 50000000

[workers]
arena_bytes = 33554432
output_bytes = 16777216
"""


@pytest.fixture(scope="session")
def models() -> Path:
    return catalogue_directory()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("a"), config=LIMITS, models=models) as running:
        yield running


@pytest.fixture(scope="session")
def identity_model(models: Path) -> bytes:
    """A model file that a tenant may upload as its own."""
    return (models / "identity" / "model.onnx").read_bytes()
