"""From a host's OCI configuration to the guest's: what stays, what goes, what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from remora.errors import InvalidArgumentError
from remora.shim import spec
from remora.wire import guest_pod_v1 as guest


def config(**changes: Any) -> dict[str, Any]:
    """Return a configuration as containerd's CRI plugin writes one for a container of a pod."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["serve"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": {"uid": 1000, "gid": 1000},
            "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "a:b:c",
            "oomScoreAdj": -997,
            "capabilities": {"bounding": ["CAP_CHOWN"]},
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/host/data", "options": ["rbind", "rprivate", "rw"]},
        ],
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod1"},
        "linux": {
            "cgroupsPath": "/kubepods/pod1/c1",
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc", "path": "/proc/42/ns/ipc"},
                {"type": "uts", "path": "/proc/42/ns/uts"},
                {"type": "mount"},
                {"type": "network", "path": "/run/netns/cni-1"},
            ],
            "resources": {
                "devices": [{"allow": False}],
                "memory": {"limit": 1 << 26, "swap": 1 << 26},
                "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "3", "mems": "0"},
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "maskedPaths": ["/proc/kcore"],
        },
        **changes,
    }


def made(value: dict[str, Any]) -> dict[str, Any]:
    return spec.guest_config(value, "c1", lambda mount: f"/in/the/guest{mount['source']}", "web")


def test_what_the_container_asked_for_stays() -> None:
    result = made(config())
    assert result["process"]["args"] == ["serve"]
    assert result["process"]["user"] == {"uid": 1000, "gid": 1000}
    assert result["process"]["capabilities"] == {"bounding": ["CAP_CHOWN"]}
    assert result["root"] == {"path": "rootfs", "readonly": True}
    assert result["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}
    assert result["linux"]["maskedPaths"] == ["/proc/kcore"]
    assert result["linux"]["resources"]["memory"] == {"limit": 1 << 26}
    assert result["linux"]["resources"]["cpu"] == {"shares": 512, "quota": 50000, "period": 100000}


def test_what_is_the_hosts_goes() -> None:
    result = made(config())
    assert not {"apparmorProfile", "selinuxLabel", "oomScoreAdj"} & set(result["process"])
    assert result["linux"]["cgroupsPath"] == "/remora/c1"
    assert result["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert [mount for mount in result["mounts"] if mount["destination"] == "/data"] == [
        {"destination": "/data", "type": "bind", "source": "/in/the/guest/host/data", "options": ["rbind", "rw"]}
    ]


def test_a_pods_container_shares_all_but_its_processes() -> None:
    result = made(config())
    assert {namespace["type"] for namespace in result["linux"]["namespaces"]} == {"mount", "cgroup", "pid"}
    assert "hostname" not in result
    assert not spec.shares_pids(config())


def test_a_shared_pid_namespace_is_the_pods() -> None:
    value = config()
    value["linux"]["namespaces"][0] = {"type": "pid", "path": "/proc/42/ns/pid"}
    assert spec.shares_pids(value)
    assert {"type": "pid", "path": guest.SHARED_PIDS} in made(value)["linux"]["namespaces"]


def test_the_way_to_the_accelerator_is_in_every_container_unless_it_says_otherwise() -> None:
    env = spec.environment(["PATH=/bin", "REMORA_ADDRESS=tcp://elsewhere:1"])
    assert "REMORA_ADDRESS=tcp://elsewhere:1" in env
    assert "VACCEL_RPC_ADDRESS=unix:///run/remora/accel.sock" in env
    assert sum(entry.startswith("REMORA_ADDRESS=") for entry in env) == 1
    assert "/run/remora" in {mount["destination"] for mount in made(config())["mounts"]}


def test_the_hosts_network_is_refused() -> None:
    value = config()
    value["linux"]["namespaces"] = [{"type": "pid"}]
    with pytest.raises(InvalidArgumentError, match="hostNetwork"):
        spec.network_namespace(value)
    assert spec.network_namespace(config()) == "/run/netns/cni-1"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hooks": {"prestart": [{"path": "/usr/bin/nvidia-hook"}]}}, "prestart"),
        ({"linux": {"namespaces": [{"type": "user"}]}}, "user namespaces"),
        ({"mounts": [{"destination": "/x", "type": "nfs", "source": "a:/b"}]}, "/x of type 'nfs'"),
        ({"process": {"args": []}}, "no command"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        made(config(**changes))


def test_only_devices_that_every_kernel_has_are_passed_on() -> None:
    value = config()
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
    value["linux"]["devices"] = [fuse, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]
    result = made(value)["linux"]
    assert result["devices"] == [fuse]
    assert {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"} in result["resources"]["devices"]
    value["linux"]["devices"] = [{"path": "/dev/xvda", "type": "b", "major": 202, "minor": 0}]
    with pytest.raises(InvalidArgumentError, match="/dev/xvda"):
        made(value)


def test_a_container_outside_kubernetes_is_a_microvm_of_its_own() -> None:
    assert spec.kind({}, "box") == spec.Kind("single", "box")
    assert spec.kind(config(), "c1") == spec.Kind("container", "pod1")
