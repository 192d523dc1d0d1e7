"""One real containerd for all tests of the shim, with Remora as its runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from containerd_process import Containerd, missing
from remora import paths
from remora.sandboxes.guest_files import guest_files


@pytest.fixture(scope="session")
def containerd() -> Iterator[Containerd]:
    lacking = missing()
    if lacking:
        pytest.skip(f"the shim's tests need {', '.join(lacking)}: run scripts/system-packages.sh as root")
    guest_files(paths.state_dir())
    with Containerd() as one:
        yield one
