"""`remora top`: what the agent does now, by tenant, model, worker and device."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from remora.cli._usage import Load
    from remora.wire import control_v1 as v1

NAME = "top"
#: Below this many columns a tenant's bytes, sessions and connections are left out.
_NARROW = 110
HELP = "show what the agent does now: tenants, models, workers and devices (q leaves)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from remora.cli import _operator

    parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="show one interval and end; so does a pipe or a file")
    _operator.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from remora.cli import _operator
    from remora.cli._usage import load_between
    from remora.errors import InvalidArgumentError

    if not 0.1 <= args.interval <= 3600:
        raise InvalidArgumentError(f"--interval {args.interval:g} is not a time", fix="give 0.1 to 3600 seconds")
    control = _operator.control_of(args)
    before = _look(control)
    if not (args.once or args.json) and sys.stdin.isatty() and sys.stdout.isatty():
        return _live(control, before, args.interval)
    time.sleep(args.interval)
    load = load_between(before, _look(control))
    if args.json:
        print(json.dumps(asdict(load), indent=2))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        console.print(view(load))
    return 0


def _look(control: Path) -> v1.UsageResponse:
    from remora.agent.status import call
    from remora.wire import control_v1 as v1

    return call(control, "Usage", v1.Empty(), v1.UsageResponse)


def _live(control: Path, before: v1.UsageResponse, interval_s: float) -> int:
    """Show the load until `q` or Ctrl-C; an agent that goes away is waited for."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from remora.cli._usage import load_between
    from remora.errors import RemoraError

    console = Console(highlight=False)
    shown: RenderableType = Text(f"looking for {interval_s:g} s ...")

    def end(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, end))
        wait_for_key = stack.enter_context(_keys())
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        live = stack.enter_context(Live(shown, console=console, screen=True, auto_refresh=False))
        while not wait_for_key(interval_s):
            try:
                after = _look(control)
            except RemoraError as error:
                live.update(Group(Text(f"{error.message}; waiting for it", style="bold red"), shown), refresh=True)
                continue
            shown, before = view(load_between(before, after), rows=console.height, width=console.width), after
            live.update(shown, refresh=True)
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Let single keys through; yields a function that waits for a time, and is True once `q` was typed."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    old = termios.tcgetattr(fd)

    def wait(timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            if select.select([fd], [], [], left_s)[0]:
                typed = os.read(fd, 64)
                if not typed or b"q" in typed.lower():
                    return True
        return False

    try:
        tty.setcbreak(fd)
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, old)


# -- the picture ------------------------------------------------------------------------------------------------------


def view(load: Load, rows: int = 0, width: int = 0) -> RenderableType:
    """Return the load as tables; with `rows` and `width` only as much as fits into that many lines and columns."""
    from rich.console import Group
    from rich.text import Text

    from remora.cli import _operator
    from remora.cli.ps import age

    state = Text("draining", style="bold yellow") if load.draining else Text("serving", style="green")
    head = Text.assemble(
        (f"remora agent {load.version}", "bold"),
        f"  pid {load.pid}  up {age(load.uptime_s)}  ",
        state,
        f"  {load.sessions} sessions, {load.connections} connections, {_operator.size(load.store_bytes)} stored",
        f"  over {load.interval_s:.1f} s",
    )
    fixed = 8 + len(load.devices) + min(len(load.workers), 6)
    room = max(3, (rows - fixed - 8) // 2) if rows else 1000
    return Group(
        head,
        _tenants(load, room, narrow=0 < width < _NARROW),
        _models(load, room),
        _table(
            ("WORKER", "PID", "DOMAIN", "DEVICE", ">JOBS", ">RESTARTS", ">MEMORY", "MODELS"),
            [
                (
                    *(worker.id, str(worker.pid), worker.domain, worker.device, str(worker.jobs)),
                    *(str(worker.restarts), _operator.size(worker.memory_bytes)),
                    ", ".join(map(_operator.short, worker.models)) or "-",
                )
                for worker in load.workers
            ],
            6 if rows else 1000,
        ),
        _table(
            ("DEVICE", ">BUSY", ">MODELS", ">THEIR MEMORY"),
            [
                (device.device, f"{device.busy:.2f}", str(device.models), _operator.size(device.memory_bytes))
                for device in load.devices
            ],
            1000,
        ),
    )


def _tenants(load: Load, room: int, *, narrow: bool) -> RenderableType:
    from remora.cli import _operator

    columns = ("TENANT", ">REQ/S", ">REFUSED/S", ">P50 MS", ">P99 MS", ">DEVICE", ">RUN", ">QUEUE", ">IN/S", ">OUT/S")
    return _table(
        columns[:8] if narrow else (*columns, ">SESSIONS", ">CONN"),
        [
            (
                tenant.tenant,
                f"{tenant.requests_per_s:.1f}",
                f"{tenant.refusals_per_s:.1f}",
                *(_ms(tenant.p50_ms), _ms(tenant.p99_ms)),
                f"{tenant.device_share:.0%}",
                *(str(tenant.running), str(tenant.queued)),
                *(_operator.size(tenant.received_bytes_per_s), _operator.size(tenant.sent_bytes_per_s)),
                *(str(tenant.sessions), str(tenant.connections)),
            )[: 8 if narrow else None]
            for tenant in load.tenants
        ],
        room,
    )


def _models(load: Load, room: int) -> RenderableType:
    return _table(
        ("MODEL", "OPERATION", ">REQ/S", ">QUEUE MS", ">BATCH MS", ">RUN MS", ">COPY MS"),
        [
            (
                *(model.model, model.operation, f"{model.requests_per_s:.1f}"),
                *(_ms(model.queue_ms), _ms(model.batch_ms), _ms(model.run_ms), _ms(model.copy_ms)),
            )
            for model in load.models
        ],
        room,
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> RenderableType:
    """Return a table; a column whose name begins with `>` has numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold reverse", padding=(0, 1), expand=True)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    for row in rows[:room]:
        table.add_row(*map(Text, row))  # names are text, never markup
    if len(rows) > room:
        table.add_row(f"... {len(rows) - room} more")
    return table
