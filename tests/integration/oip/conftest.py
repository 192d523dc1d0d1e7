"""One agent with the Open Inference Protocol on a Unix socket and on a loopback port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, catalogue_directory

CONFIG = """
[limits]
message_bytes = 8388608
in_flight_bytes_per_tenant = 16777216
frame_timeout_s = 1
json_bytes = 262144

[workers]
arena_bytes = 33554432
output_bytes = 16777216
"""


class OipAgent(AgentProcess):
    """An agent whose Open Inference Protocol addresses are known."""

    @property
    def oip_socket(self) -> Path:
        return self.directory / "oip.sock"

    @property
    def oip_port(self) -> int:
        return int(self.listening.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipAgent]:
    directory = tmp_path_factory.mktemp("o")
    running = OipAgent(directory, config=CONFIG, models=catalogue_directory())
    running.start("--listen", f"oip+unix://{running.oip_socket}", "--listen", "oip+tcp://127.0.0.1:0")
    try:
        yield running
    finally:
        status = running.stop()
    assert status == 0, running.log[-3000:]
    assert "internal error" not in running.log, running.log[-3000:]
    assert not running.oip_socket.exists()
