"""`remora classify`: what the SDK does, for people and shell scripts: pictures in, labels out."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remora import Label

NAME = "classify"
HELP = "classify pictures through the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="JPEG, PNG, WebP, GIF or BMP file; - for stdin")
    parser.add_argument("--model", default="efficientnet-lite0", help="model of the catalogue (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels per picture (default: %(default)s)")
    parser.add_argument("--address", help="where the agent is (default: REMORA_ADDRESS or the usual places)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for each picture")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture and line")


def run(args: argparse.Namespace) -> int:
    """Classify each picture; one that fails does not keep the others from their turn, but fails the command."""
    import remora

    status = 0
    with remora.connect(args.address, call_timeout_s=args.timeout) as session:
        for picture in args.pictures:
            source: Any = sys.stdin.buffer if picture == "-" else picture
            try:
                labels = session.classify(source, model=args.model, top=args.top)
            except (remora.UnavailableError, remora.PermissionDeniedError):
                raise  # true of every picture
            except remora.RemoraError as error:
                if args.debug:
                    raise
                print(f"remora classify: {picture}: {error}", file=sys.stderr)
                status = status or error.exit_status
                continue
            _show(picture, labels, as_json=args.json)
    return status


def _show(picture: str, labels: list[Label], *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"picture": picture, "labels": [label._asdict() for label in labels]}), flush=True)
        return
    print(picture)
    for label in labels:
        print(f"  {label.score:6.1%}  {label.name}", flush=True)
