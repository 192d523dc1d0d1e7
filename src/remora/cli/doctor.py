"""`remora doctor`: what this host can do, and for each gap the fix."""

from __future__ import annotations

import argparse
import json
import sys

NAME = "doctor"
HELP = "say what this host can do, and what is missing"
_MARKS = {"ok": "ok", "note": "--", "bad": "!!"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Status 0: all main parts work. 1: one of them (marked !!) cannot. Lines marked -- are choices."
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from remora.doctor.examination import examine
    from remora.doctor.report import worst

    terminal = sys.stderr.isatty() and not args.json

    def show(title: str) -> None:
        if terminal:
            print(f"\r\x1b[Klooking at {title} ...", end="", file=sys.stderr, flush=True)

    findings = examine(show)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    verdict = worst(findings)
    if args.json:
        print(json.dumps({"state": verdict, "findings": [finding._asdict() for finding in findings]}, indent=2))
        return int(verdict == "bad")
    area = ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.area != area:
            area = finding.area
            print(area)
        print(f"  {_MARKS[finding.state]} {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            print(f"     {'':<{width}}  -> {finding.fix}")
    return int(verdict == "bad")
