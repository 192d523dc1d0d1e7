"""A process in a pod's cgroup, and the agent that tells it from the host's processes of the same user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import catalogue_directory, running_agent

UID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
CONTAINER = "ab" * 32
CONFIG = '[[label]]\nmatch = { namespace = "prod" }\nmodels = ["efficientnet-*"]\n'
_ASK = """
import sys
import remora
open(sys.argv[1], "w").write("0")
with remora.connect() as session:
    print(sorted(model.name for model in session.models()))
    try:
        session.infer("identity", {"input": remora.Tensor(bytes(4), "float32", [1, 1, 1, 1])})
    except remora.errors.RemoraError as error:
        print(error)
"""


@pytest.fixture
def pod_cgroup() -> Iterator[Path]:
    """A cgroup as the kubelet's cgroupfs driver makes one, in whichever hierarchy this host lets us."""
    for root in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        top = root / "kubepods"
        group = top / "burstable" / f"pod{UID}" / CONTAINER
        try:
            group.mkdir(parents=True)
        except OSError:
            continue
        yield group / "cgroup.procs"
        for directory in (group, group.parent, group.parent.parent, top):
            directory.rmdir()
        return
    pytest.skip("no cgroup can be made here: run as root, with cgroups mounted")


def test_a_pod_is_not_the_user_it_runs_as(tmp_path: Path, pod_cgroup: Path) -> None:
    with running_agent(tmp_path, config=CONFIG, models=catalogue_directory()) as agent:
        names = tmp_path / "run" / "pods"
        names.mkdir(mode=0o700)
        (names / f"{UID}.json").write_text(json.dumps({"namespace": "prod", "name": "web-1"}))
        child = subprocess.run(
            [sys.executable, "-c", _ASK, str(pod_cgroup)],
            env={**os.environ, "REMORA_ADDRESS": agent.address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        listed, refused = child.stdout.splitlines()
        assert listed == "['efficientnet-lite0']"
        assert "rule [[label]] 1 models" in refused
        assert f"pod:{UID}" in agent.log
        assert "sandbox=prod/web-1" in agent.log.replace('"', "")
