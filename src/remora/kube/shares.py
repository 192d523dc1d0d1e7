"""Shares of a node's accelerators, as the kubelet counts them: which there are, which to prefer, and what a container
is told of those it got. Pure.

A share is a part of one device, named `<kind><device>-<number>`. What counts for the agent is how many a pod has: they
are device time, and the agent puts models where they run best. Which shares they are matters to the kubelet's books,
and to the next pod: shares of one device leave other devices whole for those who ask for many.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from remora.errors import InvalidArgumentError
from remora.kube import device_plugin_v1beta1 as v1
from remora.wire import control_v1

DOMAIN = "remora.dev"
#: Annotation of a container, set by the kubelet from `Allocate`: the grant's id. Not below `io.remora.`: containerd
#: passes that prefix from a pod's own annotations (docs/decisions/0016).
GRANT = "grant.remora.dev"
#: More would make each of the kubelet's lists longer than its default message (4 MiB) has room for.
MOST_SHARES = 10000
#: Where a request goes that fits on one device: where least room is left for it, or where most is.
PLACEMENTS = ("pack", "spread")
_KIND = re.compile(r"[a-z][a-z0-9]{0,15}")
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of accelerator, cut into shares: `remora.dev/<kind>`."""

    kind: str
    devices: int
    shares_per_device: int = 10
    placement: str = PLACEMENTS[0]
    #: NUMA node by device, of those that have one.
    nodes: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise InvalidArgumentError(f"{self.kind[:40]!r} is no kind of accelerator", fix="gpu or cpu, for instance")
        if self.devices < 1 or self.shares_per_device < 1 or self.devices * self.shares_per_device > MOST_SHARES:
            raise InvalidArgumentError(
                f"{self.devices} devices of {self.shares_per_device} shares cannot be advertised",
                fix=f"use 1 to {MOST_SHARES} shares in all",
            )
        if self.placement not in PLACEMENTS:
            raise InvalidArgumentError(f"{self.placement!r} is no placement", fix=f"use {' or '.join(PLACEMENTS)}")

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
        topologies = {device: v1.Topology(nodes=[v1.NumaNode(id=node)]) for device, node in self.nodes.items()}
        return v1.ListAndWatchResponse(
            devices=[v1.Device(id=one, health=health, topology=topologies.get(self._device(one))) for one in self.ids()]
        )

    def _device(self, share: str) -> int:
        return int(share.removeprefix(self.kind).partition("-")[0])

    # -- which to prefer --------------------------------------------------------------------------------------------

    def preferred(self, request: v1.PreferredRequest) -> v1.PreferredResponse:
        """Return which shares to give each container.

        Raises:
            InvalidArgumentError: an id that was never advertised, or more than there are.
        """
        return v1.PreferredResponse(
            container_responses=[
                v1.ContainerPreferredResponse(device_ids=self._chosen(one.available, one.must_include, one.size))
                for one in request.container_requests
            ]
        )

    def _chosen(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        self._check((*available, *must_include))
        chosen = list(dict.fromkeys(must_include))
        if not len(chosen) <= size <= len({*available, *chosen}):
            raise InvalidArgumentError(
                f"{size} shares of {len(available)} cannot be chosen, {len(chosen)} of them given",
                fix="ask for no more than are available",
            )
        free: dict[int, list[str]] = {}
        for share in sorted(set(available) - set(chosen), key=self._order):
            free.setdefault(self._device(share), []).append(share)
        while (left := size - len(chosen)) > 0:
            device = self._next(free, left, {self._device(share) for share in chosen})
            chosen += free.pop(device)[:left]
        return sorted(chosen, key=self._order)

    def _next(self, free: Mapping[int, Sequence[str]], wanted: int, used: set[int]) -> int:
        """Return the device to take from next: one in use already, else one on its NUMA node, else one that holds all
        that is wanted, by placement; if none does, the one that holds most."""
        near = {self.nodes[device] for device in used if device in self.nodes}

        def rank(device: int) -> tuple[bool, bool, bool, int, int]:
            room = len(free[device])
            fits = room >= wanted
            tight = room if fits and self.placement == "pack" else -room
            return (device not in used, bool(near) and self.nodes.get(device) not in near, not fits, tight, device)

        return min(free, key=rank)

    def _order(self, share: str) -> tuple[int, int]:
        return self._device(share), int(share.rpartition("-")[2])

    # -- giving them ------------------------------------------------------------------------------------------------

    def allocate(
        self, request: v1.AllocateRequest, state: Callable[[control_v1.GrantRequest], None]
    ) -> v1.AllocateResponse:
        """
        Args:
            state: Tells the agent of a grant; what it raises is the answer.

        Raises:
            InvalidArgumentError: an id that was never advertised, or one twice: not even a kubelet gives a share away
                that does not exist.
        """
        given = [one for container in request.container_requests for one in container.devices_ids]
        self._check(given)
        if len(set(given)) != len(given):
            raise InvalidArgumentError("a share was asked for twice", fix="allocate each share once")
        return v1.AllocateResponse(
            container_responses=[self._granted(list(one.devices_ids), state) for one in request.container_requests]
        )

    def _granted(
        self, shares: list[str], state: Callable[[control_v1.GrantRequest], None]
    ) -> v1.ContainerAllocateResponse:
        if not shares:
            return v1.ContainerAllocateResponse()
        grant = control_v1.GrantRequest(
            id=secrets.token_hex(_ID_BYTES), kind=self.kind, shares=shares, shares_per_device=self.shares_per_device
        )
        state(grant)
        return v1.ContainerAllocateResponse(
            annotations={f"{GRANT}/{self.kind}": grant.id},
            envs={f"REMORA_GRANT_{self.kind.upper()}": f"{len(shares)}/{self.shares_per_device}"},
        )

    def _check(self, shares: Iterable[str]) -> None:
        known = set(self.ids())
        for one in shares:
            if one not in known:
                raise InvalidArgumentError(
                    f"{self.name} has no share {one[:80]!r}", fix="allocate what ListAndWatch lists"
                )
