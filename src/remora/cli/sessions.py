"""`remora sessions`: who has a session at the agent, and what it holds."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "sessions"
HELP = "list the sessions of the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from remora.cli import _operator

    _operator.add_options(parser, tenant=True)


def run(args: argparse.Namespace) -> int:
    from remora.cli import _operator
    from remora.cli.ps import age
    from remora.wire import control_v1 as v1

    def entries(answer: Any) -> Any:
        return answer.sessions

    found: list[v1.SessionEntry] = list(
        _operator.pages(_operator.control_of(args), "Sessions", v1.SessionsResponse, entries, args.tenant)
    )
    rows: list[dict[str, object]] = [
        {
            "id": entry.id,
            "tenant": entry.tenant,
            "owner": entry.owner,
            "protocol": "vaccel" if entry.vaccel else "remora",
            "template": entry.template,
            "connections": entry.connections,
            "models": list(entry.models),
            "resources": entry.resources,
            "lease_s": round(entry.lease_s, 1),
        }
        for entry in found
    ]
    columns = [("SESSION", "TENANT", "OWNER", "PROTOCOL", "CONNECTIONS", "RESOURCES", "MODELS", "ENDS IN")]
    for entry in found:
        ends = "-" if entry.connections else "with its template" if entry.template else age(entry.lease_s)
        models = ", ".join(map(_operator.short, entry.models)) or "-"
        protocol = "vaccel" if entry.vaccel else "remora"
        counts = str(entry.connections), str(entry.resources)
        columns.append((entry.id, entry.tenant, entry.owner, protocol, *counts, models, ends))
    _operator.show(rows, columns, as_json=args.json, nothing="no sessions")
    return 0
