"""`remora inspect`: everything known about a microVM, as JSON."""

from __future__ import annotations

import argparse
import json

NAME = "inspect"
HELP = "show everything about a microVM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="accepted for habit: it is always JSON")
    parser.add_argument("--devices", action="store_true", help="ask the guest for its devices, too")
    parser.add_argument("microvm", nargs="+", metavar="MICROVM", help="name or id")


def run(args: argparse.Namespace) -> int:
    from remora.cli.ps import public
    from remora.sandboxes.sandbox import Sandbox, find, sweep

    sweep()
    shown = []
    for name in args.microvm:
        record = find(name)
        fields = {**public(record.fields), "directory": str(record.directory)}
        if args.devices:
            with Sandbox.open(name) as sandbox:
                devices = sandbox.devices()
            fields["devices"] = list(devices.devices)
            fields["device_nodes"] = list(devices.nodes)
            fields["guest_kernel"] = devices.kernel
        shown.append(fields)
    print(json.dumps(shown, indent=2))
    return 0
