"""A real containerd for each module of the shim's tests, with Remora as its runtime: what one leaves, no other sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from containerd_process import Containerd, missing
from pod_agent import Agent, add_service_image
from pod_leftovers import wait_until
from remora import paths
from remora.sandboxes.guest_files import guest_files


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    lacking = missing()
    if lacking:
        pytest.skip(f"the shim's tests need {', '.join(lacking)}: run scripts/system-packages.sh as root")
    guest_files(paths.state_dir())
    with Containerd() as one:
        yield one
        wait_until(lambda: not one.of_pods(), f"nothing of this module's pods is left: {one.of_pods()}")


@pytest.fixture(scope="module")
def agent(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """The node's agent for this containerd's pods, and the image of the service that asks it."""
    scratch = tmp_path_factory.mktemp("agent")
    add_service_image(containerd, scratch)
    one = Agent(containerd, scratch / "state")
    one.start()
    yield one
    one.stop()
