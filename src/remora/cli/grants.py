"""`remora grants`: which sandboxes have which shares of the node's devices, as the kubelet gave them."""

from __future__ import annotations

import argparse

NAME = "grants"
HELP = "list the shares of devices that the kubelet gave to sandboxes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from remora.cli import _operator

    _operator.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from remora.agent.status import call
    from remora.cli import _operator
    from remora.wire import control_v1 as v1

    answer = call(_operator.control_of(args), "Attachments", v1.Empty(), v1.AttachmentsResponse)
    rows: list[dict[str, object]] = []
    columns: list[tuple[str, ...]] = [("SANDBOX", "NAMESPACE", "POD", "DEVICES", "SHARES", "SECONDS PER SECOND")]
    for attachment in sorted(answer.attachments, key=lambda one: one.sandbox):
        namespace, pod = attachment.labels.get("namespace", ""), attachment.labels.get("pod", "")
        for granted in attachment.grants:
            rate = granted.shares / granted.shares_per_device
            columns.append(
                (
                    attachment.sandbox,
                    namespace or "-",
                    pod or "-",
                    granted.kind,
                    f"{granted.shares} of {granted.shares_per_device} per device",
                    f"{rate:g}",
                )
            )
            rows.append(
                {
                    "sandbox": attachment.sandbox,
                    "namespace": namespace,
                    "pod": pod,
                    "kind": granted.kind,
                    "shares": granted.shares,
                    "shares_per_device": granted.shares_per_device,
                    "device_s_per_s": rate,
                }
            )
    _operator.show(rows, columns, as_json=args.json, nothing="no sandbox has a grant")
    return 0
