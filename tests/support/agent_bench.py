"""An agent's core over workers that a test controls, without sockets or processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_workers import FakeWorkers
from remora.agent.core import Core
from remora.agent.logs import Log
from remora.agent.policy import Policy
from remora.reactor import Reactor


@contextmanager
def agent_core(directory: Path, policy: Policy | None = None) -> Iterator[Core]:
    """Make a core with an empty catalogue; its log goes to `<directory>/log`."""
    state = directory / "state"
    state.mkdir()
    log_fd = os.open(directory / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    errors: list[BaseException] = []
    reactor, log = Reactor(errors.append), Log(log_fd)
    core = Core(reactor, state, policy or Policy(), FakeWorkers(), {}, log)
    try:
        yield core
    finally:
        core.close()
        reactor.close()
        log.close()
        os.close(log_fd)
    assert not errors
