"""`remora bench`: figures of this machine, each beside its yardstick."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

NAME = "bench"
HELP = "Measure Remora against named yardsticks in one run: ratios are what to look at, times depend on the machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--quick", action="store_true", help="some seconds: shows that it works, not how fast it is")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")


def run(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console
    from rich.progress import Progress

    from remora.bench.host import describe_host
    from remora.bench.measures import Plan, measure
    from remora.errors import InvalidArgumentError

    if args.output:  # before minutes of measuring
        try:
            args.output.open("a").close()
        except OSError as error:
            raise InvalidArgumentError(
                f"{args.output} cannot be written: {error.strerror}", fix="give another --output"
            ) from error
    signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(128 + signum))  # the agent that it started ends, too
    plan = Plan.quick() if args.quick else Plan()
    errors = Console(stderr=True)
    host = describe_host()  # before: its load is what others did
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=plan.steps)
        results = measure(plan, lambda: progress.advance(task))
    report = {"host": host, "quick": args.quick, "results": results}
    text = json.dumps(report, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        _print_table(results)
    return 0


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("result", "measured", "yardstick", "", "ratio")
    for name, result in results.items():
        yardstick = result["yardstick"]
        table.add_row(name, _amount(result), _amount(yardstick), yardstick["name"], f"{result['ratio']:.2f}")
        for peer in result.get("peers", ()):
            table.add_row(f"  {peer['name']}", _amount(peer), _amount(result), "Remora", f"{peer['ratio']:.2f}")
    Console().print(table)


def _amount(figures: dict[str, Any]) -> str:
    if "per_second" in figures:
        return f"{figures['per_second']:.1f}/s"
    return f"{figures['median_us'] / 1000:.3f} ms"
