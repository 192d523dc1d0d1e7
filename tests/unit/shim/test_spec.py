"""From a host's OCI configuration to the guest's: what stays, what goes, what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from remora.errors import InvalidArgumentError
from remora.shim import devices, spec
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


def block_config(access: str = "rwm", **changes: Any) -> dict[str, Any]:
    value = config()
    device = {
        "path": "/dev/xvda",
        "type": "b",
        "major": 7,
        "minor": 3,
        "fileMode": 0o640,
        "uid": 5,
        "gid": 6,
        **changes,
    }
    value["linux"]["devices"] = [device, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]
    rule = {"allow": True, "type": "b", "major": 7, "minor": 3, "access": access}
    value["linux"]["resources"]["devices"] = [{"allow": False, "access": "rwm"}, rule]
    return value


def test_a_block_device_is_given_by_its_number_in_the_guest_with_owner_mode_and_access() -> None:
    value = block_config("r")
    (device,) = devices.asked(value)
    assert (device.major, device.minor, device.writable) == (7, 3, False)
    result = made(value)
    assert result["linux"]["devices"] == []
    spec.give_devices(result, [(device, 254, 16)])
    node = {"path": "/dev/xvda", "type": "b", "major": 254, "minor": 16, "fileMode": 0o640, "uid": 5, "gid": 6}
    assert result["linux"]["devices"] == [node]
    rule = {"allow": True, "type": "b", "major": 254, "minor": 16, "access": "r"}
    assert result["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}, rule]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (block_config(path="/dev/fuse", type="c", major=10, minor=229), "/dev/fuse .*takes only block devices"),
        (block_config(path="/dev/nvidia0", type="c", major=195, minor=0), "/dev/nvidia0"),
        (block_config(path="/dev/pipe", type="p"), "/dev/pipe"),
        (block_config("m"), "/dev/xvda .*no cgroup rule"),
        (block_config(minor=4), "no cgroup rule"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_by_name(value: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        devices.asked(value)


def test_a_later_rule_takes_back_what_an_earlier_one_gave() -> None:
    value = block_config()
    value["linux"]["resources"]["devices"].append({"allow": False, "access": "w"})
    assert devices.asked(value)[0].access == "rm"


def test_a_container_outside_kubernetes_is_a_microvm_of_its_own() -> None:
    assert spec.kind({}, "box") == spec.Kind("single", "box")
    assert spec.kind(config(), "c1") == spec.Kind("container", "pod1")
