"""`remora logs`: what a detached microVM has written."""

from __future__ import annotations

import argparse
import os
import threading
import time

from remora.errors import FailedPreconditionError

NAME = "logs"
HELP = "show the output of a detached microVM"
POLL_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the microVM ends")
    parser.add_argument("microvm", metavar="MICROVM", help="name or id")


def run(args: argparse.Namespace) -> int:
    from remora import paths
    from remora.sandboxes import logfiles
    from remora.sandboxes.registry import Registry
    from remora.sandboxes.sandbox import sweep

    sweep()
    registry = Registry(paths.runtime_dir())
    record = registry.find(args.microvm)
    if not record.fields.get("detached"):
        raise FailedPreconditionError(
            f"the microVM {record.name or record.id} writes to the terminal that runs it", fix="only -d keeps output"
        )
    failures: list[OSError] = []

    def is_live() -> bool:
        return args.follow and not failures and registry.is_alive(record)

    def copy(name: str, fd: int) -> None:
        try:
            for data in logfiles.read(record.directory, name, is_live=is_live, wait=lambda: time.sleep(POLL_S)):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in (("stdout", 1), ("stderr", 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return 0
