"""Shares of a node's accelerators, as the kubelet counts them, and what a container is told of those it got. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from remora.errors import InvalidArgumentError
from remora.kube import device_plugin_v1beta1 as v1

DOMAIN = "remora.dev"
#: Annotation of a container, set by the kubelet from `Allocate`. Not below `io.remora.`: containerd passes that prefix
#: from a pod's own annotations, and a pod must not grant itself shares.
GRANT = "grant.remora.dev"
#: More would make each of the kubelet's lists longer than its default message (4 MiB) has room for.
MOST_SHARES = 10000
_KIND = re.compile(r"[a-z][a-z0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of accelerator, cut into shares: `remora.dev/<kind>`."""

    kind: str
    devices: int
    shares_per_device: int = 10

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise InvalidArgumentError(f"{self.kind[:40]!r} is no kind of accelerator", fix="gpu or cpu, for instance")
        if self.devices < 1 or self.shares_per_device < 1 or self.devices * self.shares_per_device > MOST_SHARES:
            raise InvalidArgumentError(
                f"{self.devices} devices of {self.shares_per_device} shares cannot be advertised",
                fix=f"use 1 to {MOST_SHARES} shares in all",
            )

    @property
    def name(self) -> str:
        return f"{DOMAIN}/{self.kind}"

    @property
    def endpoint(self) -> str:
        """File name of this resource's socket in the kubelet's directory."""
        return f"remora-{self.kind}.sock"

    def ids(self) -> list[str]:
        return [f"{self.kind}{d}-{s}" for d in range(self.devices) for s in range(self.shares_per_device)]

    def listed(self, *, healthy: bool) -> v1.ListAndWatchResponse:
        health = v1.HEALTHY if healthy else v1.UNHEALTHY
        return v1.ListAndWatchResponse(devices=[v1.Device(id=one, health=health) for one in self.ids()])

    def allocate(self, request: v1.AllocateRequest) -> v1.AllocateResponse:
        """
        Raises:
            InvalidArgumentError: an id that was never advertised, or one twice: not even a kubelet gives a share away
                that does not exist.
        """
        return v1.AllocateResponse(container_responses=self._grants(request.container_requests))

    def _grants(self, requests: Sequence[v1.ContainerAllocateRequest]) -> list[v1.ContainerAllocateResponse]:
        known, given, answers = set(self.ids()), set[str](), []
        for request in requests:
            for one in request.devices_ids:
                if one not in known:
                    raise InvalidArgumentError(
                        f"{self.name} has no share {one[:80]!r}", fix="allocate what ListAndWatch lists"
                    )
                if one in given:
                    raise InvalidArgumentError(f"share {one} was asked for twice", fix="allocate each share once")
                given.add(one)
            ids = ",".join(sorted(request.devices_ids))
            answers.append(
                v1.ContainerAllocateResponse(
                    annotations={f"{GRANT}/{self.kind}": ids},
                    envs={f"REMORA_GRANT_{self.kind.upper()}": f"{len(request.devices_ids)}/{self.shares_per_device}"},
                )
            )
        return answers
