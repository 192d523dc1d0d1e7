"""`remora classify`: what the SDK does, for people and shell scripts: pictures in, labels out."""

from __future__ import annotations

import argparse

from remora.cli import _pictures

NAME = "classify"
HELP = "classify pictures through the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _pictures.add_arguments(parser, model="efficientnet-lite0")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels per picture (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    return _pictures.look(
        args,
        NAME,
        lambda session, picture: session.classify(picture, model=args.model, top=args.top),
        lambda labels: {"labels": [label._asdict() for label in labels]},
        lambda labels: [f"{label.score:6.1%}  {label.name}" for label in labels],
    )
