"""`remora rm`: forget microVMs that have ended, or with -f end them first."""

from __future__ import annotations

import argparse

from remora.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError

NAME = "rm"
HELP = "remove stopped microVMs"
GONE_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="end those that run")
    parser.add_argument("microvm", nargs="+", metavar="MICROVM", help="name or id")


def run(args: argparse.Namespace) -> int:
    from remora import paths
    from remora.sandboxes.registry import Registry
    from remora.sandboxes.sandbox import Sandbox, sweep

    sweep()
    registry = Registry(paths.runtime_dir())
    for name in args.microvm:
        record = registry.find(name)
        if registry.is_alive(record):
            if not args.force:
                raise FailedPreconditionError(
                    f"the microVM {name} is {record.state}", fix=f"stop it first, or: remora rm -f {name}"
                )
            sandbox = Sandbox(record, None)
            try:
                sandbox.kill()
            except UnavailableError:
                pass  # it has just ended by itself
            if not sandbox.wait_until_gone(GONE_S):
                raise DeadlineExceededError(f"the microVM {name} did not end within {GONE_S:g} s")
        registry.remove(record.directory)
        print(name)
    return 0
