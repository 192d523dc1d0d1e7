"""One real cluster for all tests of this folder: `make test-kubernetes`. None of `make test`: the first run builds
Kubernetes from its modules, which takes a while."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import kubernetes_binaries
from containerd_process import Containerd, missing
from kubernetes_cluster import Cluster
from remora import paths
from remora.sandboxes.guest_files import guest_files


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not os.environ.get("REMORA_TEST_KUBERNETES"):
        pytest.skip("a cluster of its own: make test-kubernetes")
    lacking = missing()
    if lacking:
        pytest.skip(f"the cluster needs {', '.join(lacking)}: run scripts/system-packages.sh as root")
    binaries = kubernetes_binaries.build()
    guest_files(paths.state_dir())
    with Containerd() as containerd, Cluster(binaries, containerd) as one:
        yield one
