"""On every door: what another tenant has gets the answer that something made up gets, and takes as long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_process import AgentProcess, catalogue_directory
from isolation import PROBES, Pair, Probe, answer, digest_of, name_of, other
from remora.wire import remora_v1, vaccel

#: For each probe; more by hand: `REMORA_TIMING_SAMPLES=2000 chrt -r 20 pytest ...`.
SAMPLES = int(os.environ.get("REMORA_TIMING_SAMPLES", "40"))
UPLOAD_BYTES = int(os.environ.get("REMORA_TIMING_BYTES", "200000"))


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    config = "[limits]\nresources_per_tenant = 100000\n"
    agent = AgentProcess(tmp_path_factory.mktemp("i"), config=config, models=catalogue_directory())
    agent.start("--listen", "oip+attached")
    yield agent
    assert agent.stop() == 0, agent.log[-2000:]
    assert "internal error" not in agent.log


@pytest.fixture(scope="module")
def pair(agent: AgentProcess) -> Iterator[Pair]:
    opened = Pair(agent, (catalogue_directory() / "identity" / "model.onnx").read_bytes(), "doors")
    yield opened
    opened.close()


@pytest.mark.parametrize("probe", PROBES, ids=str)
def test_what_another_tenant_has_is_answered_like_what_nobody_has(pair: Pair, probe: Probe) -> None:
    theirs = name_of(pair, probe.kind)
    nobodys = other(probe.kind, theirs) if probe.kind != "name" else "x" * len(theirs)
    assert answer(pair, probe, theirs) == answer(pair, probe, nobodys)


def test_every_request_that_can_name_something_is_probed() -> None:
    probed = {probe.what for probe in PROBES}
    named = {method for method in vaccel.METHODS if method not in ("CreateSession", "GenopStream")}
    named |= {method for method in remora_v1.METHODS if method not in ("Close", "Models", "Noop")}
    assert named <= probed


def test_what_was_probed_is_still_alices(pair: Pair) -> None:
    pair.alice.ping()
    assert pair.alice.infer(pair.model, 3.0).outputs
    assert pair.alice.stat(pair.model).complete
    pair.alice_vaccel.call(
        vaccel.SERVICES[0],
        "SyncResource",
        vaccel.ResourceSyncRequest(resource_id=pair.resource),
        vaccel.ResourceSyncResponse,
    )


def test_lists_hold_nothing_of_another_tenant(pair: Pair) -> None:
    models = pair.native.call("Models", remora_v1.Empty(), remora_v1.ModelsResponse).models
    assert pair.model not in [model.name for model in models]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_of_the_host_reaches_neither_control_nor_metrics(agent: AgentProcess) -> None:
    """A sandbox reaches no file of the host at all; this is whoever runs beside the agent."""
    attempt = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        socket.socket(socket.AF_UNIX).connect(path)\n"
        "    except PermissionError:\n        continue\n"
        "    sys.exit(path)\n"
    )
    for path in (agent.control.parent, agent.control, agent.metrics, agent.state):
        assert path.stat().st_mode & 0o077 == 0, path
    tried = [agent.control, agent.metrics, *Path(agent.directory).glob("sandbox-*/channel.sock_*")]
    done = subprocess.run(
        [sys.executable, "-c", attempt, *map(str, tried)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- time -------------------------------------------------------------------------------------------------------------


def assert_alike(name: str, take: Callable[[str, int], float]) -> None:
    """Compare two kinds of request, in turns: the chance that one takes longer must be a half, within 5 sigma.

    It is the statistic of Mann and Whitney, for which nothing need be known of the times but that they are independent.
    """
    taken: dict[str, list[float]] = {"theirs": [], "nobodys": []}
    for turn in range(SAMPLES + 3):
        for kind in ("theirs", "nobodys") if turn % 2 else ("nobodys", "theirs"):
            taken[kind].append(take(kind, turn))
    theirs, nobodys = (np.array(times[3:]) for times in taken.values())
    chance = np.mean(theirs[:, None] > nobodys[None, :]) + np.mean(theirs[:, None] == nobodys[None, :]) / 2
    sigma = ((2 * SAMPLES + 1) / (12 * SAMPLES**2)) ** 0.5
    medians = ", ".join(f"{kind} {np.median(times[3:]) * 1e6:.1f} us" for kind, times in taken.items())
    print(f"TIMING {name}: {medians}, chance {chance:.3f}, sigma {sigma:.3f}, n {SAMPLES}")
    assert abs(chance - 0.5) < 5 * sigma, f"{name}: {medians}, chance {chance:.3f}"


@pytest.mark.parametrize("probe", [probe for probe in PROBES if probe.kind != "name"], ids=str)
def test_what_another_tenant_has_takes_as_long_as_what_nobody_has(pair: Pair, probe: Probe) -> None:
    theirs = name_of(pair, probe.kind)
    names = {"theirs": theirs, "nobodys": other(probe.kind, theirs)}

    def take(kind: str, _turn: int) -> float:
        began_s = time.perf_counter()
        probe.send(pair, names[kind])
        return time.perf_counter() - began_s

    assert_alike(str(probe), take)


@pytest.mark.parametrize("door", ["native", "vaccel"])
def test_an_upload_takes_as_long_whether_another_tenant_has_the_bytes_or_nobody(pair: Pair, door: str) -> None:
    random = np.random.default_rng(5 if door == "native" else 6)

    def take(kind: str, _turn: int) -> float:
        data = random.bytes(UPLOAD_BYTES)
        if kind == "theirs":
            assert pair.alice.upload(digest_of(data), data).complete
        else:  # the agent, its disk and its journal do the same before
            before = random.bytes(UPLOAD_BYTES)
            assert pair.alice.upload(digest_of(before), before).complete
        request: Any
        if door == "native":
            request = remora_v1.PutResourceRequest(digest=digest_of(data), total_bytes=len(data), data=data)
            service, method = remora_v1.SERVICE, "PutResource"
        else:
            blob = vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER, name="b", data=data)
            request = vaccel.ResourceRegisterRequest(session_id=pair.bob_session, resource_type=1, blobs=[blob])
            service, method = vaccel.SERVICES[0], "RegisterResource"
        began_s = time.perf_counter()
        pair.raw.call(service, method, request)
        return time.perf_counter() - began_s

    assert_alike(f"{door}-upload", take)
