"""`remora workers`: the processes that compute for the agent."""

from __future__ import annotations

import argparse

NAME = "workers"
HELP = "list the worker processes of the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from remora.cli import _operator

    _operator.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from remora.agent.status import as_dict, ask
    from remora.cli import _operator

    answer = ask(_operator.control_of(args))
    rows: list[dict[str, object]] = as_dict(answer, "")["workers"]
    columns = [("WORKER", "PID", "DOMAIN", "DEVICE", "JOBS", "RESTARTS", "MEMORY", "MODELS")]
    for worker in answer.workers:
        models = ", ".join(map(_operator.short, worker.models)) or "-"
        counts = str(worker.jobs), str(worker.restarts), _operator.size(worker.memory_bytes)
        columns.append((worker.id, str(worker.pid), worker.domain or "spare", worker.device, *counts, models))
    _operator.show(rows, columns, as_json=args.json, nothing="no workers")
    return 0
