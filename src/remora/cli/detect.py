"""`remora detect`: the objects in pictures, with their boxes in pixels."""

from __future__ import annotations

import argparse

from remora.cli import _pictures

NAME = "detect"
HELP = "find the objects in pictures through the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _pictures.add_arguments(parser)
    parser.add_argument("--top", type=int, metavar="N", help="objects per picture at most (default: all)")


def run(args: argparse.Namespace) -> int:
    return _pictures.look(
        args,
        NAME,
        lambda session, picture: session.detect(picture, model=args.model, top=args.top),
        lambda objects: {"objects": [found._asdict() for found in objects]},
        lambda objects: [
            "{:6.1%}  {:16} {:.0f},{:.0f} to {:.0f},{:.0f}".format(found.score, found.name, *found.box)
            for found in objects
        ],
    )
