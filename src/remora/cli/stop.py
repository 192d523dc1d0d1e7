"""`remora stop`: end microVMs, politely and then not."""

from __future__ import annotations

import argparse

from remora.errors import DeadlineExceededError

NAME = "stop"
HELP = "stop microVMs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time", default="10s", metavar="TIME", help="until SIGKILL follows SIGTERM (default 10s)")
    parser.add_argument("microvm", nargs="+", metavar="MICROVM", help="name or id")


def run(args: argparse.Namespace) -> int:
    from remora.sandboxes.options import parse_duration_s
    from remora.sandboxes.sandbox import Sandbox, find, sweep

    sweep()
    time_s = parse_duration_s(args.time)
    for name in args.microvm:
        if find(name).state == "exited":
            continue
        with Sandbox.open(name) as sandbox:
            sandbox.request_stop(time_s=time_s)
            if not sandbox.wait_until_gone(time_s + 20.0):
                raise DeadlineExceededError(f"the microVM {name} did not stop", fix=f"remora rm -f {name}")
        print(name)
    return 0
