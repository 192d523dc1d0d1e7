"""`remora ping`: the first thing to try when a function cannot reach its accelerator."""

from __future__ import annotations

import argparse

NAME = "ping"
HELP = "check the way to the agent: open a session and measure round trips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="where the agent is (default: REMORA_ADDRESS or the usual places)")
    parser.add_argument("--count", type=_positive, default=20, metavar="N", help="round trips (default: 20)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait for the agent")


def run(args: argparse.Namespace) -> int:
    import statistics

    import remora

    with remora.connect(args.address, timeout_s=args.timeout, call_timeout_s=args.timeout, reconnect_s=0) as session:
        session.ping()  # the first one pays for what both sides set up lazily
        times_us = [session.ping() * 1e6 for _ in range(args.count)]
        print(f"agent       {session.agent or 'unnamed'} at {session.address}")
        print(f"session     {session.id}")
        print(f"operations  {', '.join(session.operations) or 'none'}")
        print(
            f"round trip  min {min(times_us):.0f} us, median {statistics.median(times_us):.0f} us, {args.count} times"
        )
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
