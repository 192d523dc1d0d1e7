"""`remora template`: functions booted once, to be cloned many times."""

from __future__ import annotations

import argparse
import json
import os
import time

from remora.cli.run import Progress, add_machine_arguments, options_of

NAME = "template"
HELP = "make, list and remove templates that microVMs are cloned from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="boot an image, wait for remora.ready(), save it",
        usage="remora template create [options] NAME IMAGE [COMMAND...]",
    )
    add_machine_arguments(create)
    create.add_argument("--tenant", default="", help="whose accelerator resources the function loads while it starts")
    create.add_argument("--ready-timeout", default="120s", metavar="TIME", help="until remora.ready() (default 120s)")
    create.add_argument("--quiet", action="store_true", help="do not show what the function writes")
    create.add_argument("name", metavar="NAME")
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    listing = actions.add_parser("list", help="list templates")
    listing.add_argument("--json", action="store_true", help="one JSON list")
    remove = actions.add_parser("remove", help="remove templates")
    remove.add_argument("names", nargs="+", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    from remora import paths
    from remora.sandboxes.sandbox import sweep
    from remora.sandboxes.templates import Templates

    sweep()
    templates = Templates(paths.state_dir())
    templates.sweep()
    if args.action == "create":
        return _create(args, templates)
    if args.action == "remove":
        for name in args.names:
            templates.remove(name)
            print(name)
        return 0
    from remora.cli.ps import age, print_table

    found = templates.list()
    if args.json:
        print(json.dumps([listed._asdict() for listed in found], indent=2))
        return 0
    rows = [("NAME", "IMAGE", "MEMORY", "ON DISK", "AGE")]
    for each in found:
        size = f"{each.size_bytes / (1 << 20):.0f}M"
        rows.append((each.name, each.image, f"{each.memory_mib}M", size, age(time.time() - each.created_s)))
    print_table(rows)
    return 0


def _create(args: argparse.Namespace, templates: object) -> int:
    from remora.sandboxes.options import Options, parse_duration_s
    from remora.sandboxes.spawner import ForkLauncher
    from remora.sandboxes.templates import Templates

    assert isinstance(templates, Templates)
    options = Options(**options_of(args))._replace(  # type: ignore[arg-type]
        image=args.image, command=tuple(args.command), tenant=args.tenant
    )
    show = Progress("making the template")
    with show:
        templates.create(
            args.name,
            options,
            ready_timeout_s=parse_duration_s(args.ready_timeout),
            launcher=ForkLauncher(),
            on_output=None if args.quiet else _show,
            progress=show.step,
        )
    print(args.name)
    return 0


def _show(data: bytes) -> None:
    """What the function says while it starts goes to stderr: stdout has only the name."""
    try:
        os.write(2, data)
    except OSError:
        pass  # our stderr is gone; the template is still wanted
