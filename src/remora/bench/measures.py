"""What is measured, and against what.

| result | measured | yardstick |
|---|---|---|
| noop | a native Noop with 64 bytes through the agent | bare echo of 64 bytes |
| tensor | 588 KiB float32 to a worker and back (identity model) | bare echo of the same bytes |
| classify_tensor | EfficientNet-Lite0 on a prepared tensor | the same backend in this process |
| classify_picture | one JPEG: decode, prepare, run, rank | the same code in this process |
| *_4_clients, *_16_clients | answers a second, so many client processes | as many threads of this process |

Peers of `tensor` (`bench.peers`): gRPC in Python with the same bytes, Triton's clients against the agent's own door.
Peer of `classify_tensor`: ONNX Runtime in this process as it comes, which runs one request on all cores.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import remora
from remora.bench.echo import echo
from remora.bench.peers import all_cores, free_port, grpc_echo, triton
from remora.bench.rig import Rig, agent
from remora.bench.rounds import Series, alternate, ratio
from remora.catalog.build import build
from remora.catalog.local import LocalModel
from remora.catalog.photos import fetch_photos

MODEL = "efficientnet-lite0"
IDENTITY = "identity"
_SMALL_BYTES = 64
_SETTLE_S = 1.5
_TENSOR_SHAPE = (1, 3, 224, 224)  # 588 KiB of float32


@dataclass(frozen=True)
class Plan:
    """How long to measure. `quick` proves that the harness works and its figures mean little."""

    rounds: int = 10
    seconds: float = 0.4
    throughput_rounds: int = 5
    throughput_seconds: float = 3.0
    clients: tuple[int, ...] = (4, 16)

    @classmethod
    def quick(cls) -> Plan:
        return cls(rounds=2, seconds=0.1, throughput_rounds=1, throughput_seconds=0.5, clients=(4,))

    @property
    def steps(self) -> int:
        return self.rounds * 13 + self.throughput_rounds * 4 * len(self.clients)


@dataclass(frozen=True)
class _Work:
    """The two inputs, and the same two operations in this process."""

    picture_path: Path
    tensor_path: Path
    picture: bytes
    tensor: np.ndarray[Any, np.dtype[np.float32]]
    model: LocalModel

    def local(self, kind: str) -> Callable[[], object]:
        if kind == "picture":
            return lambda: self.model.classify(self.picture)
        name = self.model.model.inputs[0].name
        return lambda: self.model.infer({name: self.tensor})

    def path(self, kind: str) -> Path:
        return self.picture_path if kind == "picture" else self.tensor_path


def measure(plan: Plan, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure everything once; `step` is called `plan.steps` times.

    Returns:
        results by name, each with its figures, its yardstick's, and their ratio.
    """
    for name in (MODEL, IDENTITY):
        build(name)
    with ExitStack() as stack:
        port = free_port()
        rig = stack.enter_context(agent(oip_port=port))
        session = stack.enter_context(remora.connect(rig.address))
        work = _prepare(rig)
        _settle(session)
        results = _latencies(plan, step, session, work, rig, port)
        for kind in ("tensor", "picture"):
            for clients in plan.clients:
                results[f"classify_{kind}_{clients}_clients"] = _throughput(plan, step, rig, work, kind, clients)
        return results


def _settle(session: remora.Session) -> None:
    """Let the agent measure its models, which it does when they first fall idle, and not while they are measured here.

    Nothing tells when it is done; it takes `WorkerSettings.calibrate_ms`, a second, of each.
    """
    names = {model.name: model.inputs[0].name for model in session.models() if model.name in (MODEL, IDENTITY)}
    for model, name in names.items():
        session.infer(model, {name: np.zeros(_TENSOR_SHAPE, np.float32)})
        time.sleep(_SETTLE_S)


def _prepare(rig: Rig) -> _Work:
    photo = fetch_photos()[0].path
    model = LocalModel.from_catalog(MODEL)
    tensor = np.ascontiguousarray(model.prepare(photo.read_bytes())).reshape(_TENSOR_SHAPE)
    path = rig.directory / "tensor.npy"
    np.save(path, tensor)
    return _Work(photo, path, photo.read_bytes(), tensor, model)


def _latencies(
    plan: Plan, step: Callable[[], None], session: remora.Session, work: _Work, rig: Rig, oip_port: int
) -> dict[str, Any]:
    """One client, one call after the other."""
    input_name = work.model.model.inputs[0].name
    identity_input = LocalModel.from_catalog(IDENTITY).model.inputs[0].name
    big = np.random.default_rng(1).random(_TENSOR_SHAPE, dtype=np.float32)
    with (
        echo(_SMALL_BYTES) as echo_small,
        echo(big.nbytes) as echo_big,
        grpc_echo(rig.directory, big) as grpc,
        triton(rig.directory / "oip.sock", oip_port, IDENTITY, identity_input, big) as clients,
    ):
        peers = {**grpc, **clients}
        whole = all_cores(MODEL, {input_name: work.tensor})
        series = alternate(
            {
                "echo_64": echo_small,
                "noop": session.ping,
                "echo_588k": echo_big,
                "tensor": lambda: session.infer(IDENTITY, {identity_input: big}),
                "local_tensor": work.local("tensor"),
                "classify_tensor": lambda: session.infer(MODEL, {input_name: work.tensor}),
                "local_picture": work.local("picture"),
                "classify_picture": lambda: session.classify(work.picture, model=MODEL),
                **peers,
                **whole,
            },
            rounds=plan.rounds,
            seconds=plan.seconds,
            step=step,
        )

    def compare(name: str, yardstick: str) -> dict[str, Any]:
        return {
            **_figures(series[name]),
            "yardstick": {"name": yardstick, **_figures(series[yardstick])},
            "ratio": round(ratio(series[name], series[yardstick]), 3),
        }

    def beside(measured: str, names: Iterable[str]) -> dict[str, Any]:
        found = [{"name": name, **_figures(series[name])} for name in names]
        return {"peers": [{**one, "ratio": round(ratio(series[one["name"]], series[measured]), 3)} for one in found]}

    return {
        "noop": compare("noop", "echo_64"),
        "tensor": {**compare("tensor", "echo_588k"), **beside("tensor", peers)},
        "classify_tensor": {**compare("classify_tensor", "local_tensor"), **beside("classify_tensor", whole)},
        "classify_picture": compare("classify_picture", "local_picture"),
    }


def _figures(series: Series) -> dict[str, Any]:
    return dict(series.as_json())


def _throughput(plan: Plan, step: Callable[[], None], rig: Rig, work: _Work, kind: str, clients: int) -> dict[str, Any]:
    """Answers a second of N client processes, and of N threads in this process, in turn."""
    local: list[float] = []
    ours: list[float] = []
    with _clients(clients, rig, kind, work.path(kind)) as run_clients:
        for _ in range(plan.throughput_rounds):
            local.append(_run_threads(clients, work.local(kind), plan.throughput_seconds))
            step()
            ours.append(run_clients(plan.throughput_seconds))
            step()
    return {
        "per_second": round(median(ours), 1),
        "yardstick": {"name": f"{clients} threads in one process", "per_second": round(median(local), 1)},
        "ratio": round(median(mine / theirs for mine, theirs in zip(ours, local, strict=True)), 3),
    }


def _run_threads(count: int, call: Callable[[], object], seconds: float) -> float:
    counts = [0] * count
    end_s = time.perf_counter() + seconds

    def repeat(number: int) -> None:
        while time.perf_counter() < end_s:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


@contextmanager
def _clients(count: int, rig: Rig, kind: str, path: Path) -> Iterator[Callable[[float], float]]:
    """Start client processes; yields a call that runs all of them for some seconds and returns answers a second."""
    command = [sys.executable, "-m", "remora.bench.client", rig.address, kind, MODEL, str(path)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        stack.callback(lambda: [process.stdin.close() for process in processes if process.stdin])
        for process in processes:
            _line(process)

        def run(seconds: float) -> float:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{seconds}\n")
                process.stdin.flush()
            return sum(int(_line(process)) for process in processes) / seconds

        yield run


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ConnectionError("a client process of the measurement ended; its error stands above")
    return line
