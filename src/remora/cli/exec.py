"""`remora exec`: another command in a running microVM."""

from __future__ import annotations

import argparse
import os

from remora.errors import InvalidArgumentError

NAME = "exec"
HELP = "run another command in a running microVM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "remora exec [options] MICROVM COMMAND..."
    parser.add_argument("-t", "--tty", action="store_true", help="give the process a terminal")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="connect stdin (the default unless stdin is a terminal)"
    )
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="variable (K alone: ours)")
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="working directory")
    parser.add_argument("-u", "--user", default="", metavar="UID[:GID]", help="user of the process")
    parser.add_argument("--timeout", metavar="TIME", help="end the process after this long (10s, 5m); status 124")
    parser.add_argument("microvm", metavar="MICROVM", help="name or id")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")


def run(args: argparse.Namespace) -> int:
    from remora.sandboxes.foreground import Foreground, terminal_size
    from remora.sandboxes.options import parse_duration_s, parse_env
    from remora.sandboxes.sandbox import Sandbox, sweep

    if not args.command:
        raise InvalidArgumentError("no command was given", fix="remora exec MICROVM COMMAND...")
    if args.tty and not os.isatty(0):
        raise InvalidArgumentError("-t was given, but stdin is no terminal", fix="leave -t out")
    environ = dict(os.environ)
    sweep()
    with (
        Sandbox.open(args.microvm) as sandbox,
        sandbox.exec(
            tuple(args.command),
            env=tuple(pair for text in args.env if (pair := parse_env(text, environ))),
            cwd=args.workdir,
            user=args.user,
            terminal=terminal_size() if args.tty else None,
            stdin=args.tty or args.interactive or not os.isatty(0),
        ) as process,
    ):
        return Foreground(process).run(parse_duration_s(args.timeout) if args.timeout else None)
