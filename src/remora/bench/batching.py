"""Batches against one at a time: answers a second of 8 and of 32 clients, the same model in the same agent.

| model | what it stands for |
|---|---|
| dear | a thousand small steps a run, whatever the rows: what a GPU's launches cost, on a CPU |
| lite0 | EfficientNet-Lite0: on a CPU each row costs the same, and batches gain little |

Each is in the catalogue twice, with `rows = 1` and with as many as help it. `python -m remora.bench.batching` prints
JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from onnx import TensorProto, helper

import remora
from remora.bench.host import describe_host
from remora.bench.rig import agent
from remora.catalog.build import build

CLIENTS = (8, 32)
#: Client processes; each has its part of the sessions in threads.
_PROCESSES = 4
_STEPS = 1000
#: Rows of a run in the batched entry, and the shape of a request.
_MODELS: dict[str, tuple[int, tuple[int, ...]]] = {"dear": (32, (1, 16)), "lite0": (4, (1, 3, 224, 224))}


def dear_model() -> bytes:
    """Return a model of float32 [N, 16] whose runs are dear and whose rows are cheap."""
    names = ["input", *(f"v{number}" for number in range(1, _STEPS)), "output"]
    nodes = [helper.make_node("Tanh", [names[step]], [names[step + 1]]) for step in range(_STEPS)]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "dear", tensors[:1], tensors[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


@contextmanager
def catalogue() -> Iterator[Path]:
    """Make a catalogue with `<model>-1` and `<model>-n` of each model."""
    lite0 = build("efficientnet-lite0").directory / "model.onnx"
    with tempfile.TemporaryDirectory(prefix="remora-models-") as name:
        for model, (rows, _shape) in _MODELS.items():
            for suffix, most in (("1", 1), ("n", rows)):
                directory = Path(name, f"{model}-{suffix}")
                directory.mkdir()
                if model == "dear":
                    (directory / "model.onnx").write_bytes(dear_model())
                else:
                    shutil.copyfile(lite0, directory / "model.onnx")
                text = f'name = "{model}-{suffix}"\ntask = "tensor"\n[batching]\nrows = {most}\n'
                (directory / "manifest.toml").write_text(text)
        yield Path(name)


def measure(rounds: int = 3, seconds: float = 2.0) -> dict[str, Any]:
    """Return answers a second by model and number of clients, with and without batches, and their ratio."""
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        rig = stack.enter_context(agent(models=stack.enter_context(catalogue())))
        for model in _MODELS:
            _measured_first(rig.address, model)
            for clients in CLIENTS:
                pairs = []
                for _ in range(rounds):
                    pairs.append([_rate(rig.address, f"{model}-{one}", clients, seconds) for one in ("1", "n")])
                alone, joined = (median(pair[index] for pair in pairs) for index in (0, 1))
                results[f"{model}_{clients}_clients"] = {
                    "per_second": round(joined, 1),
                    "yardstick": {"name": "one at a time", "per_second": round(alone, 1)},
                    "ratio": round(median(pair[1] / pair[0] for pair in pairs), 3),
                }
    return results


def _measured_first(address: str, model: str) -> None:
    """Let the agent measure both entries: it does so when they first fall idle, within a second."""
    with remora.connect(address) as session:
        for suffix in ("1", "n"):
            session.infer(f"{model}-{suffix}", {"input": np.zeros(_MODELS[model][1], np.float32)})
    time.sleep(3.0)


def _rate(address: str, model: str, clients: int, seconds: float) -> float:
    """Return answers a second of so many sessions."""
    command = [sys.executable, "-m", "remora.bench.batching", address, model, str(clients // _PROCESSES), str(seconds)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(_PROCESSES)
        ]
        for process in processes:
            if process.stdout is None or not process.stdout.readline():
                raise ConnectionError("a client process of the measurement ended; its error stands above")
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()  # off they go
        return sum(float(process.stdout.read()) for process in processes if process.stdout is not None) / seconds


def client(address: str, model: str, sessions: int, seconds: float) -> None:
    """Repeat requests in so many sessions once standard input ends; print the number of answers."""
    array = np.zeros(_MODELS[model.rpartition("-")[0]][1], np.float32)
    counts = [0] * sessions
    with ExitStack() as stack:
        opened = [stack.enter_context(remora.connect(address)) for _ in range(sessions)]
        for session in opened:
            session.infer(model, {"input": array})
        print("ready", flush=True)
        sys.stdin.read()
        end_s = time.perf_counter() + seconds

        def repeat(number: int) -> None:
            while time.perf_counter() < end_s:
                opened[number].infer(model, {"input": array})
                counts[number] += 1

        threads = [threading.Thread(target=repeat, args=(number,)) for number in range(sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(sum(counts), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        client(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        print(json.dumps({"host": describe_host(), "results": measure()}, indent=2))
