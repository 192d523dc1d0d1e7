"""`remora pose`: the points of the body of the person in each picture, in pixels."""

from __future__ import annotations

import argparse

from remora.cli import _pictures

NAME = "pose"
HELP = "find a person's points in pictures through the agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _pictures.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return _pictures.look(
        args,
        NAME,
        lambda session, picture: session.pose(picture, model=args.model),
        lambda points: {"keypoints": [point._asdict() for point in points]},
        lambda points: [f"{point.score:6.1%}  {point.name:16} {point.x:.0f},{point.y:.0f}" for point in points],
    )
