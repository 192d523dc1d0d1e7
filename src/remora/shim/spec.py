"""From the OCI configuration that containerd wrote for a host to the one that crun runs in the guest. Pure.

What belongs to the host goes (its namespaces, cgroups, labels, devices); what the container asked for stays (command,
environment, user, capabilities, seccomp, rlimits, limits, read-only root). What a microVM cannot give is refused here,
by name, before anything is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from remora.errors import InvalidArgumentError
from remora.shim.devices import BlockDevice
from remora.wire import guest_pod_v1 as guest

#: The accelerator's door, as every container sees it.
ADDRESS = "unix:///run/remora/accel.sock"
SDK = "/run/remora/sdk"
_CONTAINER_TYPE = "io.kubernetes.cri.container-type"
_SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
#: Mounts that a kernel makes out of nothing, in the guest as well as here.
_KERNEL_MOUNTS = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2")
#: What a host's driver adds to a container and a microVM has no use for.
_DROPPED_RESOURCES = ("devices", "hugepageLimits", "network", "rdma", "blockIO", "unified")

#: Returns where in the guest a bind mount's source is; raises for what cannot be had.
Resolve = Callable[[dict[str, Any]], str]
#: A block device that was asked for, and its major and minor number in the guest.
GuestDevice = tuple[BlockDevice, int, int]


class Kind(NamedTuple):
    """What a config.json is about."""

    #: `sandbox` (a pod's own), `container` (in a pod), or `single` (a microVM of its own).
    role: str
    #: Of the pod.
    sandbox: str


def kind(config: dict[str, Any], container_id: str) -> Kind:
    annotations = config.get("annotations") or {}
    role = annotations.get(_CONTAINER_TYPE, "single")
    return Kind(role if role in ("sandbox", "container") else "single", annotations.get(_SANDBOX_ID) or container_id)


def network_namespace(config: dict[str, Any]) -> str | None:
    """Return the path of the pod's network namespace; None if it is to have no network.

    Raises:
        InvalidArgumentError: it wants the host's.
    """
    for namespace in _namespaces(config):
        if namespace.get("type") == "network":
            return namespace.get("path") or None
    raise InvalidArgumentError(
        "hostNetwork (a pod without a network namespace of its own) cannot be had in a microVM",
        fix="remove hostNetwork: true, or run the pod with another runtime class",
    )


def guest_config(config: dict[str, Any], container_id: str, resolve: Resolve, hostname: str) -> dict[str, Any]:
    """Return the config.json for the guest, without devices (`give_devices`).

    Raises:
        InvalidArgumentError: something in it is the host's and cannot be had; the message names it.
    """
    _refuse(config)
    linux = config.get("linux") or {}
    resources = {key: value for key, value in (linux.get("resources") or {}).items() if key not in _DROPPED_RESOURCES}
    return {
        "ociVersion": "1.0.2",
        "process": guest_process(config.get("process") or {}, first=True),
        "root": {"path": "rootfs", "readonly": bool((config.get("root") or {}).get("readonly"))},
        # In a pod the name is the guest's own.
        **({"hostname": hostname} if {"type": "uts"} in _guest_namespaces(config) else {}),
        "mounts": [*_mounts(config, resolve), *_own_mounts()],
        "linux": {
            "cgroupsPath": f"{guest.CGROUP_PARENT}/{container_id}",
            "namespaces": _guest_namespaces(config),
            "resources": {**guest_resources(resources), "devices": [{"allow": False, "access": "rwm"}]},
            "devices": [],
            "maskedPaths": linux.get("maskedPaths") or [],
            "readonlyPaths": linux.get("readonlyPaths") or [],
            **({"seccomp": linux["seccomp"]} if linux.get("seccomp") else {}),
            **({"sysctl": _own_sysctls(config)} if _own_sysctls(config) else {}),
        },
    }


def give_devices(made: dict[str, Any], devices: Sequence[GuestDevice]) -> None:
    """Add block devices to what `guest_config` returned. The guest's other disks and its channel stay denied, to root
    as well; /dev/null and its kin are made by crun, as in any container."""
    for device, major, minor in devices:
        node = {"path": device.path, "type": "b", "major": major, "minor": minor}
        made["linux"]["devices"].append({**node, "fileMode": device.mode, "uid": device.uid, "gid": device.gid})
        rule = {"allow": True, "type": "b", "major": major, "minor": minor, "access": device.access}
        made["linux"]["resources"]["devices"].append(rule)


def guest_process(process: dict[str, Any], *, first: bool = False) -> dict[str, Any]:
    """Return an OCI process for the guest: without the host's labels, with the way to the accelerator."""
    kept = {key: value for key, value in process.items() if key not in ("apparmorProfile", "selinuxLabel")}
    if not kept.get("args"):
        raise InvalidArgumentError("the process has no command", fix="give the image an entry point, or name a command")
    # The host's value may be lower than a process of the guest may set.
    kept.pop("oomScoreAdj", None)
    kept["env"] = environment(list(process.get("env") or []))
    return kept


def environment(env: list[str]) -> list[str]:
    """Add what every container can count on, where it does not say otherwise itself."""
    names = {entry.partition("=")[0] for entry in env}
    added = [f"{name}={ADDRESS}" for name in ("REMORA_ADDRESS", "VACCEL_RPC_ADDRESS") if name not in names]
    # It goes before a remora that the image has installed: this one knows what its guest speaks.
    if "PYTHONPATH" not in names:
        added.append(f"PYTHONPATH={SDK}")
    return [*env, *added]


def guest_resources(resources: dict[str, Any]) -> dict[str, Any]:
    """Return limits as the guest's kernel takes them: its own processors and no host's cpuset."""
    kept = {key: value for key, value in resources.items() if key not in _DROPPED_RESOURCES and value}
    if "cpu" in kept:
        kept["cpu"] = {
            key: value for key, value in kept["cpu"].items() if key in ("shares", "quota", "period", "burst") and value
        }
        if not kept["cpu"].get("quota") or kept["cpu"]["quota"] < 0:
            kept["cpu"].pop("quota", None)
            kept["cpu"].pop("period", None)
    if "memory" in kept:
        # The guest has no swap: a limit for both would be refused.
        kept["memory"] = {key: value for key, value in kept["memory"].items() if key in ("limit", "reservation")}
    return kept


def shares_pids(config: dict[str, Any]) -> bool:
    """True if the container joins the PID namespace of another one of its pod."""
    return any(n.get("type") == "pid" and n.get("path") for n in _namespaces(config))


def sysctls(config: dict[str, Any]) -> dict[str, str]:
    """Return the pod's sysctls: those of the sandbox, which owns the guest's network."""
    return dict((config.get("linux") or {}).get("sysctl") or {})


def _namespaces(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list((config.get("linux") or {}).get("namespaces") or [])


def _guest_namespaces(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A pod shares network, IPC and host name: the guest's own. PIDs are shared by request."""
    joins_pod = bool(shares_pids(config))
    kept: list[dict[str, Any]] = [{"type": "mount"}, {"type": "cgroup"}]
    for namespace in _namespaces(config):
        match namespace.get("type"):
            case "pid":
                kept.append({"type": "pid", "path": guest.SHARED_PIDS} if joins_pod else {"type": "pid"})
            case "ipc" | "uts" if not namespace.get("path") and kind(config, "").role == "single":
                kept.append({"type": namespace["type"]})
            case _:
                continue
    return kept


def _refuse(config: dict[str, Any]) -> None:
    hooks = config.get("hooks") or {}
    named = [name for name, entries in hooks.items() if entries]
    if named:
        raise InvalidArgumentError(
            f"the container has OCI hooks ({', '.join(named)}), which run programs of the host",
            fix="remove what injects them (a device runtime, for instance) from this runtime class",
        )
    if any(n.get("type") == "user" for n in _namespaces(config)):
        raise InvalidArgumentError(
            "user namespaces (hostUsers: false) are not passed into the microVM",
            fix="remove hostUsers: false: the microVM separates the pod from the host's users already",
        )


def _mounts(config: dict[str, Any], resolve: Resolve) -> list[dict[str, Any]]:
    kept = []
    for mount in config.get("mounts") or []:
        destination, kind_ = mount.get("destination", ""), mount.get("type", "")
        if destination.rstrip("/") in ("/run/remora", SDK):
            continue  # Remora's own, below
        options = list(mount.get("options") or [])
        if kind_ == "bind" or "bind" in options or "rbind" in options:
            source = resolve(mount)
            # rslave and the like are about the host's mounts.
            options = [o for o in options if not o.endswith(("shared", "slave", "private")) and o not in ("rro",)]
            kept.append({"destination": destination, "type": "bind", "source": source, "options": options})
        elif kind_ in _KERNEL_MOUNTS:
            kept.append({**mount, "type": "cgroup" if kind_ == "cgroup2" else kind_})
        else:
            raise InvalidArgumentError(f"the mount {destination} of type {kind_!r} cannot be had in a microVM")
    return kept


def _own_mounts() -> list[dict[str, Any]]:
    def own(source: str, destination: str) -> dict[str, Any]:
        options = ["rbind", "ro", "nosuid", "nodev"]
        return {"destination": destination, "type": "bind", "source": source, "options": options}

    return [own(guest.SHARED, "/run/remora"), own(guest.SDK, SDK)]


def _own_sysctls(config: dict[str, Any]) -> dict[str, str]:
    return sysctls(config) if kind(config, "").role == "single" else {}
