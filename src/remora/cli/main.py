"""The `remora` command: finds the subcommand and turns errors into one clear line.

Each subcommand is a module beside this one with NAME, HELP, `add_arguments` and `run`; it is imported only when it is
asked for, because `remora --help` and `remora run` must not pay for each other's imports.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

from remora.errors import RemoraError

#: Subcommand -> one line of help; the order is the order of `remora --help`. A test compares it with the modules.
COMMANDS: dict[str, str] = {
    "run": "run a command in a new microVM",
    "ps": "list microVMs",
    "exec": "run another command in a running microVM",
    "logs": "show the output of a detached microVM",
    "stop": "stop microVMs",
    "rm": "remove stopped microVMs",
    "inspect": "show everything about a microVM",
    "stats": "show CPU and memory of microVMs",
    "template": "make, list and remove templates that microVMs are cloned from",
    "image": "import, pull, build, list and remove images",
    "models": "build, list and show the models of the catalogue",
    "agent": "run the node agent, or ask for its status",
    "top": "show what the agent does now: tenants, models, workers and devices",
    "sessions": "list the sessions of the agent",
    "resources": "list the uploads that the agent stores",
    "workers": "list the worker processes of the agent",
    "grants": "list the shares of devices that the kubelet gave to sandboxes",
    "policy": "check a configuration file, or show the policy in effect",
    "classify": "classify pictures through the agent",
    "detect": "find the objects in pictures through the agent",
    "segment": "tell the parts of pictures from one another through the agent",
    "pose": "find a person's points in pictures through the agent",
    "ping": "check the way to the agent",
    "node": "set up a Kubernetes node, and serve its shares of accelerators to its kubelet",
    "autoscaling": "serve pods' figures to HorizontalPodAutoscalers (custom.metrics.k8s.io)",
    "doctor": "say what this host can do, and what is missing",
    "bench": "measure Remora against named yardsticks",
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="remora",
        usage="remora [--debug] [--version] COMMAND [ARGUMENTS...]",
        description="Accelerators for functions in microVMs: the guest sends operations, a node agent runs them.",
        epilog=f"commands:\n{listing}\n\n`remora COMMAND --help` tells more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error, not only its line")
    parser.add_argument("--version", action="store_true", help="show the version")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Return (our own options, command, its arguments): a guest's command line is none of argparse's business."""
    for position, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return arguments[:position], argument, arguments[position + 1 :]
    return arguments, None, []


def _run(name: str, arguments: Sequence[str], *, debug: bool) -> int:
    module = importlib.import_module(f"remora.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"remora {name}", description=module.HELP)
    parser.add_argument("--debug", action="store_true", default=debug, help="show the trace of an error")
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(arguments))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    own, command, rest = _split(list(sys.argv[1:] if argv is None else argv))
    parser = _parser()
    options = parser.parse_args(own)
    if options.version:
        from remora import __version__

        print(f"remora {__version__}")
        return 0
    if command is None:
        parser.print_help()
        return 2
    if command not in COMMANDS:
        print(f"remora: no command '{command}'; `remora --help` lists them", file=sys.stderr)
        return 2
    debug = options.debug or _asks_for_debug(rest) or bool(os.environ.get("REMORA_DEBUG"))
    try:
        return _run(command, rest, debug=debug)
    except RemoraError as error:
        if debug:
            raise
        print(f"remora {command}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        if debug:
            raise
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output left, as `head` does. Python would complain once more at exit: give it another stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("remora"):
            raise
        print(
            f"remora {command}: the Python package '{error.name}' is missing "
            "(install remora[node] for the agent, remora[runtime] for microVMs)",
            file=sys.stderr,
        )
        return 7
    except OSError as error:
        if debug:
            raise
        what = f": {error.filename}" if error.filename else ""
        fix = "--debug shows where"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            from remora import paths

            fix = f"free some space; images, models and uploads lie in {paths.state_dir()}; {fix}"
        print(f"remora {command}: {error.strerror or error}{what} ({fix})", file=sys.stderr)
        return 1


def _asks_for_debug(arguments: Sequence[str]) -> bool:
    """True if --debug stands among a command's own options, before the command line that a guest gets."""
    for argument in arguments:
        if argument == "--debug":
            return True
        if not argument.startswith("-"):
            return False
    return False


if __name__ == "__main__":
    sys.exit(main())
