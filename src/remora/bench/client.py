"""One client process: repeats an operation through the agent as fast as the answers come.

A client is a process of its own because functions are: threads of one process would share an interpreter lock that
real clients do not share.

Protocol: prints `ready`, waits for a line with the number of seconds, runs, prints the number of answers, and again;
ends at the end of its standard input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import remora
from remora.catalog.local import LocalModel


def operation(session: remora.Session, kind: str, model: str, path: Path) -> Callable[[], object]:
    """Return a call that makes one request: `picture` classifies the file, `tensor` infers on the array in it."""
    if kind == "picture":
        picture = path.read_bytes()
        return lambda: session.classify(picture, model=model)
    feeds = {LocalModel.from_catalog(model).model.inputs[0].name: np.load(path)}
    return lambda: session.infer(model, feeds)


def main(address: str, kind: str, model: str, path: str) -> None:
    with remora.connect(address) as session:
        call = operation(session, kind, model, Path(path))
        call()
        print("ready", flush=True)
        for line in sys.stdin:
            count, end_s = 0, time.perf_counter() + float(line)
            while time.perf_counter() < end_s:
                call()
                count += 1
            print(count, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
