"""What the commands that look at pictures have in common: their arguments, and one picture after the other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remora import Session


def add_arguments(parser: argparse.ArgumentParser, *, model: str = "") -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="JPEG, PNG, WebP, GIF or BMP file; - for stdin")
    default = "default: %(default)s" if model else "default: the catalogue's first for this"
    parser.add_argument("--model", default=model or None, help=f"model of the catalogue ({default})")
    parser.add_argument("--address", help="where the agent is (default: REMORA_ADDRESS or the usual places)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for each picture")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture and line")


def look(
    args: argparse.Namespace,
    name: str,
    find: Callable[[Session, Any], Any],
    facts: Callable[[Any], dict[str, object]],
    lines: Callable[[Any], Iterable[str]],
) -> int:
    """Look at each picture; one that fails does not keep the others from their turn, but fails the command.

    Args:
        find: Asks the agent about one picture, a path or an open file.
        facts: What was found, for --json.
        lines: What was found, for people.
    """
    import remora

    status = 0
    with remora.connect(args.address, call_timeout_s=args.timeout) as session:
        for picture in args.pictures:
            source: Any = sys.stdin.buffer if picture == "-" else picture
            try:
                found = find(session, source)
            except (remora.UnavailableError, remora.PermissionDeniedError, remora.UnimplementedError):
                raise  # true of every picture
            except remora.RemoraError as error:
                if args.debug:
                    raise
                print(f"remora {name}: {picture}: {error}", file=sys.stderr)
                status = status or error.exit_status
                continue
            if args.json:
                import json

                print(json.dumps({"picture": picture, **facts(found)}), flush=True)
                continue
            print(picture)
            for line in lines(found):
                print(f"  {line}", flush=True)
    return status
