"""`remora node`: what a Kubernetes node runs beside its agent."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from remora import paths

NAME = "node"
HELP = "serve the node's shares of accelerators to its kubelet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("plugin",), help="plugin: be the kubelet's device plugin, until SIGTERM")
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
        thread.join()
    return 0
