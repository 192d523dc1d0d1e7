"""`remora run`: a command in a new microVM, as if it were a local one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from remora.errors import InvalidArgumentError

NAME = "run"
HELP = "run a command in a new microVM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "remora run [options] IMAGE [COMMAND...]\n       remora run [options] --template NAME"
    add_machine_arguments(parser)
    parser.add_argument("-t", "--tty", action="store_true", help="give the process a terminal")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="connect stdin (the default unless stdin is a terminal)"
    )
    parser.add_argument("-d", "--detach", action="store_true", help="print the id and go; see logs, ps, stop, rm")
    parser.add_argument("--timeout", metavar="TIME", help="end the process after this long (10s, 5m); status 124")
    parser.add_argument("--name", default="", help="name of the microVM")
    parser.add_argument("--hostname", default="", help="host name in the guest (default: the name or id)")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="label, for policy and ps")
    parser.add_argument("--tenant", default="", help="whose accelerator resources it shares (default: its own)")
    parser.add_argument("--template", metavar="NAME", help="clone this template instead of booting an image")
    parser.add_argument("--rm", action="store_true", help="accepted for habit: without -d it is always so")
    parser.add_argument("image", nargs="?", metavar="IMAGE")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="replaces the image's command")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what describes a machine and its process; `remora template create` has them, too."""
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="variable (K alone: ours)")
    parser.add_argument("--env-file", action="append", default=[], metavar="FILE", help="file of variables, one a line")
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="working directory")
    parser.add_argument("-u", "--user", default="", metavar="UID[:GID]", help="user of the process")
    parser.add_argument("--entrypoint", metavar="COMMAND", help="replaces the image's entry point")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SPEC",
        help="type=tmpfs,dst=D | type=image,src=FILE.erofs,dst=D,ro | type=bind,src=DIRECTORY,dst=D,ro",
    )
    parser.add_argument("--read-only", action="store_true", help="read-only root file system")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual CPUs (default 1)")
    parser.add_argument("-m", "--memory", default="256M", metavar="SIZE", help="memory of the guest (default 256M)")
    parser.add_argument(
        "--vmm",
        default=os.environ.get("REMORA_VMM", "qemu"),
        metavar="NAME",
        help="monitor: qemu, firecracker, cloud-hypervisor (default: $REMORA_VMM, else qemu; the last two need KVM)",
    )
    parser.add_argument(
        "--jail",
        action="append",
        default=[],
        metavar="PART",
        help="run Firecracker in its jailer (root only): uid=UID or uid=FIRST-LAST (needed) | gid=GID | base=DIRECTORY"
        " | cgroup=FILE=VALUE | parent-cgroup=NAME | netns=FILE; one part each time",
    )
    parser.add_argument("--boot-timeout", default="60s", metavar="TIME", help=argparse.SUPPRESS)
    parser.add_argument("--no-accel", action="store_true", help="no way to the node agent")


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """Return what `add_machine_arguments` read, as fields of `Options`."""
    from remora.sandboxes.jailing import parse as parse_jail
    from remora.sandboxes.options import (
        parse_duration_s,
        parse_env,
        parse_env_file,
        parse_mount,
        parse_size_mib,
    )

    environ = dict(os.environ)
    env = [pair for file in args.env_file for pair in parse_env_file(Path(file), environ)]
    env += [pair for text in args.env if (pair := parse_env(text, environ))]
    return {
        "env": tuple(env),
        "cwd": args.workdir,
        "user": args.user,
        "entrypoint": None if args.entrypoint is None else tuple(args.entrypoint.split()),
        "mounts": tuple(parse_mount(text) for text in args.mount),
        "readonly_root": args.read_only,
        "cpus": args.cpus,
        "memory_mib": parse_size_mib(args.memory),
        "vmm": args.vmm,
        "jail": parse_jail(args.jail) if args.jail else None,
        "boot_timeout_s": parse_duration_s(args.boot_timeout),
        "accelerator": not args.no_accel,
    }


def run(args: argparse.Namespace) -> int:
    from remora.sandboxes.foreground import Foreground, terminal_size
    from remora.sandboxes.options import Options, parse_duration_s, parse_pair
    from remora.sandboxes.sandbox import Sandbox, sweep
    from remora.sandboxes.spawner import ForkLauncher

    if args.template and args.image:
        raise InvalidArgumentError(
            f"both the template {args.template} and the image {args.image} were named",
            fix="a clone runs its template's function: name no image and no command",
        )
    if not args.template and not args.image:
        raise InvalidArgumentError("no image was named", fix="remora run [options] IMAGE [COMMAND...]")
    if args.tty and not os.isatty(0):
        raise InvalidArgumentError("-t was given, but stdin is no terminal", fix="leave -t out")
    if args.tty and args.detach:
        raise InvalidArgumentError("-t and -d exclude each other", fix="use remora exec -t in the detached microVM")
    timeout_s = parse_duration_s(args.timeout) if args.timeout else None
    if timeout_s is not None and args.detach:
        raise InvalidArgumentError("--timeout and -d exclude each other", fix="use `remora stop` later")
    options = Options(**options_of(args))._replace(  # type: ignore[arg-type]
        image=args.image or "",
        command=tuple(args.command),
        name=args.name,
        hostname=args.hostname,
        labels=tuple(parse_pair(text, "label") for text in args.label),
        tenant=args.tenant,
        terminal=terminal_size() if args.tty else None,
        stdin=not args.detach and (args.tty or args.interactive or not os.isatty(0)),
        detached=args.detach,
    )
    sweep()
    show = Progress("starting the microVM")
    with show:
        if args.template:
            sandbox = Sandbox.clone(args.template, options, launcher=ForkLauncher(), on_slow=show.slow)
        else:
            sandbox = Sandbox.boot(options, launcher=ForkLauncher(), on_slow=show.slow, progress=show.step)
    if sandbox.warning:
        print(f"remora run: no accelerator: {sandbox.warning}", file=sys.stderr)
    if args.detach:
        sandbox.release()
        print(sandbox.id)
        return 0
    with sandbox:
        return Foreground(sandbox.process).run(timeout_s)


class Progress:
    """One line on stderr, if that is a terminal and it takes long; gone again at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def slow(self) -> None:
        self._show(f"{self._what} ...")

    def step(self, what: str, fraction: float) -> None:
        """Show a step of a long preparation (the guest OS image, on first use)."""
        if fraction < 1.0:
            self._show(f"preparing the guest OS image: {what} ({fraction:.0%})")

    def _show(self, text: str) -> None:
        if self._terminal:
            self._shown = True
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
