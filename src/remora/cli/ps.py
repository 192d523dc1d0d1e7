"""`remora ps`: the microVMs of this host."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

NAME = "ps"
HELP = "list microVMs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="exited ones, too")
    parser.add_argument("-q", "--quiet", action="store_true", help="only ids")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="only those with this label")


def run(args: argparse.Namespace) -> int:
    from remora import paths
    from remora.sandboxes.options import parse_pair
    from remora.sandboxes.registry import Registry
    from remora.sandboxes.sandbox import sweep

    sweep()
    wanted = dict(parse_pair(text, "label") for text in args.label)
    records = [
        record
        for record in Registry(paths.runtime_dir()).all()
        if (args.all or record.state != "exited") and wanted.items() <= dict(record.fields.get("labels", {})).items()
    ]
    if args.json:
        print(json.dumps([public(record.fields) for record in records], indent=2))
        return 0
    if args.quiet:
        for record in records:
            print(record.id)
        return 0
    rows = [("ID", "NAME", "IMAGE", "COMMAND", "STATE", "AGE")]
    for record in records:
        fields = record.fields
        source = f"{fields['image']} ({fields['template']})" if fields.get("template") else fields.get("image", "")
        rows.append(
            (
                record.id,
                record.name or "-",
                str(source),
                _short(" ".join(fields.get("command", ()))),
                describe_state(fields),
                age(time.time() - float(fields.get("created_s", 0))),
            )
        )
    print_table(rows)
    return 0


def public(fields: dict[str, object]) -> dict[str, object]:
    """Return what of a record is for others; variables may hold secrets and are left out."""
    hidden = ("env", "machine_started", "saved")
    return {key: value for key, value in fields.items() if key not in hidden}


def describe_state(fields: dict[str, object]) -> str:
    if fields.get("state") != "exited":
        return str(fields.get("state", "starting"))
    return f"exited ({fields.get('exit_status', '?')})"


def age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(max(0, seconds))}s"


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _short(text: str, width: int = 32) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= width else text[: width - 1] + "…"
