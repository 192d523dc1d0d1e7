"""`remora resources`: what tenants have uploaded to the agent."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "resources"
HELP = "list the uploads that the agent stores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from remora.cli import _operator

    _operator.add_options(parser, tenant=True)


def run(args: argparse.Namespace) -> int:
    import time

    from remora.cli import _operator
    from remora.cli.ps import age
    from remora.wire import control_v1 as v1

    def entries(answer: Any) -> Any:
        return answer.resources

    found: list[v1.ResourceEntry] = list(
        _operator.pages(_operator.control_of(args), "Resources", v1.ResourcesResponse, entries, args.tenant)
    )
    found.sort(key=lambda entry: (entry.tenant, -entry.size_bytes))
    rows: list[dict[str, object]] = [
        {
            "digest": entry.digest,
            "tenant": entry.tenant,
            "size_bytes": entry.size_bytes,
            "sessions": entry.holds,
            "used_at_s": round(entry.used_at_s, 3),
            "loaded": entry.loaded,
        }
        for entry in found
    ]
    columns = [("DIGEST", "TENANT", "SIZE", "SESSIONS", "LOADED", "LAST USED")]
    for entry in found:
        used = "now" if entry.holds else f"{age(time.time() - entry.used_at_s)} ago"
        state = "yes" if entry.loaded else "-"
        shown = _operator.short(entry.digest), entry.tenant, _operator.size(entry.size_bytes), str(entry.holds)
        columns.append((*shown, state, used))
    _operator.show(rows, columns, as_json=args.json, nothing="no uploads")
    return 0
