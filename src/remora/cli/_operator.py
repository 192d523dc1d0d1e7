"""What the operator's commands share: the agent's control socket, and numbers as people read them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from remora import paths
from remora.wire import control_v1 as v1
from remora.wire.protobuf import Message

E = TypeVar("E", bound=Message)


def add_options(parser: argparse.ArgumentParser, *, tenant: bool = False) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help=f"the agent's control socket (default: {paths.control_socket()})"
    )
    if tenant:
        parser.add_argument("--tenant", default="", metavar="NAME", help="only this tenant's, such as uid:1000")


def control_of(args: argparse.Namespace) -> Path:
    return Path(args.control or paths.control_socket()).absolute()


def pages(
    control: Path, method: str, answer: type[Message], entries: Callable[[Message], Sequence[E]], tenant: str
) -> Iterator[E]:
    """Yield a list of the agent's, page by page. Raises as `agent.status.call`."""
    from remora.agent.status import call

    offset = 0
    while True:
        page = entries(call(control, method, v1.PageRequest(tenant=tenant, offset=offset), answer))
        if not page:
            return
        yield from page
        offset += len(page)


def show(rows: Sequence[dict[str, object]], columns: Sequence[tuple[str, ...]], *, as_json: bool, nothing: str) -> None:
    """Print rows as one JSON list, or `columns` (the heading first) as a table; `nothing` where there are none."""
    from remora.cli.ps import print_table

    if as_json:
        print(json.dumps(list(rows), indent=2))
    elif rows:
        print_table(list(columns))
    else:
        print(nothing)


def short(digest: str) -> str:
    """Return a digest as it fits into a column."""
    return digest[: len("sha256:") + 12] if digest.startswith("sha256:") else digest


def size(count: float) -> str:
    """Return bytes for people: 1.5 kB, 12 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
