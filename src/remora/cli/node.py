"""`remora node`: sets a Kubernetes node up, and what it runs beside its agent."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from remora import paths

if TYPE_CHECKING:
    from remora.kube.node_files import Node

NAME = "node"
HELP = "set up a Kubernetes node, and serve its shares of accelerators to its kubelet"
_LOOK_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _plugin_arguments(actions.add_parser("plugin", help="be the kubelet's device plugin, until SIGTERM"))
    installing = actions.add_parser(
        "install", help="put shim, settings and agent on this node; tell containerd of them"
    )
    installing.add_argument(
        "--config",
        default="/etc/containerd/config.toml",
        metavar="PATH",
        help="containerd's configuration on the node (default: /etc/containerd/config.toml)",
    )
    installing.add_argument(
        "--bin-dir",
        default="/usr/local/bin",
        metavar="DIR",
        help="a directory on containerd's PATH (default: /usr/local/bin)",
    )
    installing.add_argument(
        "--no-agent", action="store_true", help="no systemd units of the agent: it is a DaemonSet, or started otherwise"
    )
    installing.add_argument(
        "--no-containerd", action="store_true", help="leave containerd alone: no shim, no runtime, only the agent"
    )
    removing = actions.add_parser("uninstall", help="take all of that back; containerd's configuration is as before")
    removing.add_argument("--force", action="store_true", help="even while pods of the runtime are running")
    for action in (installing, removing):
        action.add_argument(
            "--root", type=Path, default=Path("/"), metavar="DIR", help="where the node's root is (default: /)"
        )
        action.add_argument("--no-restart", action="store_true", help="restart nothing; say what is to be restarted")
        action.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        action.add_argument("--json", action="store_true", help="what was done, as JSON")


def _plugin_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="advertise remora.dev/gpu for N GPUs")
    parser.add_argument(
        "--cpus", type=int, metavar="N", help="advertise remora.dev/cpu for N processors (default: all, 0: not at all)"
    )
    parser.add_argument("--shares", type=int, default=10, metavar="N", help="shares of each device (default: 10)")
    parser.add_argument(
        "--placement",
        choices=("pack", "spread"),
        default="pack",
        help="which device's shares to prefer: the one with least room for a request, which keeps others whole, or the "
        "one with most (default: pack)",
    )
    parser.add_argument(
        "--kubelet",
        type=Path,
        default=Path("/var/lib/kubelet/device-plugins"),
        metavar="DIR",
        help="the kubelet's directory of plugins (default: /var/lib/kubelet/device-plugins)",
    )
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help=f"the agent's control socket (default: {paths.control_socket()})"
    )


def run(args: argparse.Namespace) -> int:
    actions = {"plugin": _plugin, "install": _install, "uninstall": _uninstall}
    return actions[args.action](args)


def _install(args: argparse.Namespace) -> int:
    from remora.kube import node_bundle, node_setup, services
    from remora.kube.node_files import Node

    node = Node(args.root, dry_run=args.dry_run)
    setup = node_setup.Setup(
        config=args.config,
        bin_dir=args.bin_dir,
        containerd=not args.no_containerd,
        agent=not args.no_agent,
        # In the agent's image, for the node that it runs on.
        bundle=node_bundle.load() if args.root != Path("/") else None,
    )
    node_setup.install(node, setup, restart=_restarter(args))
    if setup.agent and node.changed and _may_ask_systemd(args):
        services.call(args.root, "Reload")
        services.call(args.root, "EnableUnitFiles", list(node_setup.UNIT_NAMES), False, True)
        services.call(args.root, "StartUnit", "remora-agent.socket", "replace")
    _tell(args, node)
    return 0


def _uninstall(args: argparse.Namespace) -> int:
    from remora.kube import node_setup, services
    from remora.kube.node_files import Node

    node = Node(args.root, dry_run=args.dry_run)

    def stop_agent() -> None:
        if _may_ask_systemd(args):
            for name in node_setup.UNIT_NAMES:
                services.call(args.root, "StopUnit", name, "replace")
            services.call(args.root, "DisableUnitFiles", list(node_setup.UNIT_NAMES), False)

    node_setup.uninstall(node, restart=_restarter(args), stop_agent=stop_agent, force=args.force)
    if _may_ask_systemd(args):
        services.call(args.root, "Reload")
    _tell(args, node)
    return 0


def _may_ask_systemd(args: argparse.Namespace) -> bool:
    from remora.kube import services

    return not args.dry_run and not args.no_restart and services.reachable(args.root)


def _restarter(args: argparse.Namespace) -> Callable[[], str]:
    """Return what has containerd read its configuration again; it answers why it did not."""
    from remora.kube import services

    def restart() -> str:
        if args.no_restart:
            return "--no-restart: restart it yourself"
        if not services.reachable(args.root):
            return "no systemd is reachable from here: restart it yourself"
        services.call(args.root, "RestartUnit", "containerd.service", "replace")
        return ""

    return restart


def _tell(args: argparse.Namespace, node: Node) -> None:
    if args.json:
        changes = [change.as_dict() for change in node.changes]
        print(json.dumps({"changed": node.changed, "dry_run": args.dry_run, "changes": changes}, indent=2))
        return
    for change in node.changes:
        print(f"{change.action:<16}{change.path}{f'  ({change.why})' if change.why else ''}")
    if not node.changed:
        print("nothing to do: the node is as it should be")


def _plugin(args: argparse.Namespace) -> int:
    from remora.agent import status
    from remora.errors import InvalidArgumentError, RemoraError
    from remora.kube import numa
    from remora.kube.plugin import DevicePlugin
    from remora.kube.shares import Resource
    from remora.wire import control_v1

    control = (args.control or paths.control_socket()).absolute()
    cpus = len(os.sched_getaffinity(0)) if args.cpus is None else args.cpus
    resources = [
        Resource(kind, n, args.shares, args.placement, {d: node for d, node in numa.nodes(kind).items() if d < n})
        for kind, n in (("gpu", args.gpus), ("cpu", cpus))
        if n
    ]
    if not resources:
        raise InvalidArgumentError("there is nothing to advertise", fix="give --gpus N or --cpus N")

    def healthy() -> bool:
        try:
            return status.health(control) == "serving"
        except RemoraError:
            return False

    def state(grant: control_v1.GrantRequest) -> None:
        status.call(control, "Grant", grant, control_v1.Empty)

    plugins = [DevicePlugin(resource, args.kubelet, healthy, state) for resource in resources]
    threads = [threading.Thread(target=plugin.run, name="plugin") for plugin in plugins]

    def stop(_signum: int, _frame: object) -> None:
        for plugin in plugins:
            plugin.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_LOOK_S)  # not forever: a signal that another thread gets is handled when this one looks
    return 0
