"""`remora policy`: check a configuration file before the agent reads it, or show what the running agent goes by."""

from __future__ import annotations

import argparse
from pathlib import Path

from remora import paths

NAME = "policy"
HELP = "check a configuration file, or show the policy in effect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "show"), help="check FILE, or show the running agent's policy")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="check: the configuration file")
    parser.add_argument("--tenant", metavar="T", help="show what applies to this tenant, and which table says so")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="as if the sandbox had this label")
    parser.add_argument("--control", type=Path, metavar="PATH", help=f"show: default {paths.control_socket()}")


def run(args: argparse.Namespace) -> int:
    from remora.agent import policy
    from remora.errors import InvalidArgumentError

    if (args.action == "check") != (args.file is not None):
        raise InvalidArgumentError(
            "`check` takes a FILE and `show` takes none", fix="remora policy check FILE, or remora policy show"
        )
    labels = {}
    for text in args.label:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidArgumentError(f"--label {text!r} is not a label", fix="write --label key=value")
        labels[key] = value
    if args.action == "check":
        read = policy.load(args.file)
        print(f"{args.file} is right: {len(read.rules.tenants)} tenants, {len(read.rules.labels)} rules by label")
    else:
        read = _ask((args.control or paths.control_socket()).absolute())
    if args.tenant is not None or labels:
        from remora.agent.rules import shown

        terms = read.rules.terms(args.tenant or "", labels)
        width = max(map(len, terms.values))
        for key, value in terms.values.items():
            text = "no bound but the node's" if value is None else shown(value)
            print(f"{key:<{width}} = {text}  # {terms.sources.get(key, 'built in')}")
    return 0


def _ask(control: Path) -> policy.Policy:
    from remora.agent import policy
    from remora.agent.status import call
    from remora.wire import control_v1 as v1

    answer = call(control, "Policy", v1.Empty(), v1.PolicyResponse, timeout_s=10.0)
    print(f"# {answer.file or 'built-in defaults: the agent has no --config'}")
    if answer.refused:
        print(f"# the last reload was refused: {answer.refused}")
    if answer.text:
        print(answer.text.rstrip())
    return policy.parse(answer.text, answer.file or "built in")


TYPE_CHECKING = False
if TYPE_CHECKING:
    from remora.agent import policy
