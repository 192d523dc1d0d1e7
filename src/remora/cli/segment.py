"""`remora segment`: which part of each picture is what; the mask itself as a PGM file that any viewer opens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.cli import _pictures

if TYPE_CHECKING:
    from remora import Segmentation, Session

NAME = "segment"
HELP = "tell the parts of pictures from one another through the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _pictures.add_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="write the mask of one picture, a PGM: 0 is the first label")


def run(args: argparse.Namespace) -> int:
    from remora.errors import InvalidArgumentError

    if args.output and len(args.pictures) != 1:
        raise InvalidArgumentError(f"--output takes one picture, {len(args.pictures)} were given")
    return _pictures.look(args, NAME, lambda session, picture: _find(session, picture, args), _facts, _lines)


def _find(session: Session, picture: Any, args: argparse.Namespace) -> Segmentation:
    found = session.segment(picture, model=args.model)
    if args.output:
        height, width = found.mask.shape
        head = f"P5 {width} {height} {max(1, len(found.labels) - 1)}\n".encode()
        Path(args.output).write_bytes(head + bytes(found.mask.data))
    return found


def _shares(found: Segmentation) -> dict[str, float]:
    data = bytes(found.mask.data)
    return {name: data.count(index) / max(1, len(data)) for index, name in enumerate(found.labels)}


def _facts(found: Segmentation) -> dict[str, object]:
    return {"size": list(reversed(found.mask.shape)), "shares": _shares(found)}


def _lines(found: Segmentation) -> list[str]:
    shares = sorted(_shares(found).items(), key=lambda item: -item[1])
    return [f"{share:6.1%}  {name}" for name, share in shares if share]
