"""The shim's pure parts: settings and sizes, identities, cgroups, the network's description, metrics, layers."""

from __future__ import annotations

import json
import os
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest

from remora.errors import InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from remora.shim import cgroups, identity, layers, network, resizing, settings, stats
from remora.vmm.contract import Network
from remora.wire import containerd as c
from remora.wire.guest_pod_v1 import StatsResponse
from remora.wire.ttrpc.messages import Any as AnyMessage

MIB = 1 << 20
CRI = "io.kubernetes.cri.sandbox-"


def test_settings_come_from_the_file_that_containerd_names(tmp_path: Path) -> None:
    file = tmp_path / "runtime.toml"
    file.write_text('[vm]\nmemory = "1G"\nscratch = "0"\n[accelerator]\nenabled = false\n')
    value = b"".join(c.RuntimeOptions(config_path=str(file)).encode())
    loaded = settings.load(AnyMessage(type_url="runtimeoptions.v1.Options", value=value))
    assert (loaded.memory_mib, loaded.scratch_mib, loaded.accelerator) == (1024, 0, False)


def test_a_setting_that_nobody_knows_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"vm\.memmory"):
        settings.parse('[vm]\nmemmory = "1G"\n')
    missing = b"".join(c.RuntimeOptions(config_path=str(tmp_path / "none.toml")).encode())
    with pytest.raises(InvalidArgumentError, match="do not exist"):
        settings.load(AnyMessage(type_url="runtimeoptions.v1.Options", value=missing))


@pytest.mark.parametrize(
    ("annotations", "resources", "size"),
    [
        ({}, {}, (512, 1)),
        ({f"{CRI}memory": str(200 * MIB)}, {}, (296, 1)),
        ({f"{CRI}cpu-quota": "250000", f"{CRI}cpu-period": "100000"}, {}, (512, 3)),
        ({}, {"memory": {"limit": 64 * MIB}, "cpu": {"quota": 50000, "period": 100000}}, (160, 1)),
        ({"io.remora.memory": "2G", "io.remora.cpus": "4", f"{CRI}memory": "1"}, {}, (2048, 4)),
    ],
)
def test_a_pods_limits_size_its_microvm(
    annotations: dict[str, str], resources: dict[str, Any], size: tuple[int, int]
) -> None:
    config = {"annotations": annotations, "linux": {"resources": resources}}
    assert settings.size(settings.Settings(), config) == size


def test_an_annotation_cannot_exceed_the_nodes_bounds() -> None:
    with pytest.raises(InvalidArgumentError, match="this node allows"):
        settings.size(settings.Settings(max_memory_mib=1024), {"annotations": {"io.remora.memory": "2G"}})


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        *(("io.remora.memory", value) for value in ("0", "-1G", "64M", "999999999999T", "9" * 5000, "lots", "", "٣G")),
        *(("io.remora.cpus", value) for value in ("0", "-1", "1.5", "9" * 5000, "many", "", "٣")),
    ],
)
def test_a_size_that_no_microvm_can_have_is_refused_with_what_to_write(annotation: str, value: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        settings.size(settings.Settings(), {"annotations": {annotation: value}})
    assert refused.value.fix
    assert len(refused.value.message) < 300


def test_a_limit_may_be_raised_as_far_as_the_microvm_reaches_and_never_stands_in_the_way_of_another() -> None:
    size = settings.Size(memory_mib=256, cpus=2)

    def memory(mib: int) -> dict[str, Any]:
        return {"memory": {"limit": mib * MIB}}

    assert resizing.guest_update(memory(160), memory(64), size) == memory(160)
    with pytest.raises(ResourceExhaustedError, match="161 MiB"):
        resizing.guest_update(memory(161), memory(64), size)
    # It was made so (io.remora.memory is less than its limit): what stays or goes down is no raise.
    assert resizing.guest_update(memory(500), memory(500), size) == memory(500)
    assert resizing.guest_update({"cpu": {"quota": 200000, "period": 100000}}, {}, size)["cpu"]["quota"] == 200000
    with pytest.raises(ResourceExhaustedError, match=r"2\.5 CPUs"):
        resizing.guest_update({"cpu": {"quota": 250000, "period": 100000}}, {}, size)
    # What the kubelet's CPU manager sends to every container.
    assert resizing.guest_update({"cpu": {"cpus": "0-3"}}, memory(500), size) == {}
    now = resizing.merged({**memory(64), "cpu": {"quota": 5}}, {"memory": {"limit": 32 * MIB}})
    assert now == {**memory(32), "cpu": {"quota": 5}}


def test_a_pod_is_known_by_namespace_and_name() -> None:
    sandbox = {
        "annotations": {
            f"{CRI}namespace": "prod",
            f"{CRI}name": "web-1",
            f"{CRI}uid": "u-1",
            "io.remora.label.tier": "gold",
            "io.remora.label.namespace": "forged",
            "io.remora.tenant": "acme",
        }
    }
    attach = identity.attach_spec(settings.Settings(), sandbox, {})
    assert attach.tenant == "prod.acme"
    assert dict(attach.labels) == {"namespace": "prod", "pod": "web-1", "uid": "u-1", "tier": "gold"}
    assert identity.sandbox_name(sandbox, "abcdef0123456789") == "prod.web-1.abcdef01"
    assert len(identity.sandbox_name({"annotations": {f"{CRI}name": "x" * 253}}, "abc")) <= 128
    assert identity.wanted(settings.Settings(), sandbox)
    assert not identity.wanted(settings.Settings(), {"annotations": {"io.remora.accelerator": "false"}})


def test_a_pod_cannot_claim_a_service_account_by_a_token_of_its_own_or_an_annotation(tmp_path: Path) -> None:
    claims = {"kubernetes.io": {"serviceaccount": {"name": "admin"}}}
    payload = urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    (tmp_path / "token").write_text(f"header.{payload}.forged")
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    container = {"mounts": [{"destination": place, "source": str(tmp_path)}]}
    sandbox = {"annotations": {f"{CRI}name": "web", "io.remora.label.service_account": "admin"}}
    attach = identity.attach_spec(settings.Settings(), sandbox, container)
    assert dict(attach.labels) == {"pod": "web"}


def test_a_pod_cannot_join_a_tenant_of_another_namespace() -> None:
    def tenant(namespace: str) -> str:
        annotations = {f"{CRI}namespace": namespace, "io.remora.tenant": "acme"}
        return identity.attach_spec(settings.Settings(), {"annotations": annotations}, {}).tenant

    assert tenant("prod") == tenant("prod")
    assert tenant("prod") != tenant("evil")


def test_a_pod_cannot_name_itself_into_a_namespace() -> None:
    for label in ("namespace", "uid", "pod"):
        sandbox = {"annotations": {f"io.remora.label.{label}": "forged"}}
        assert identity.attach_spec(settings.Settings(), sandbox, {}).labels == ()


def test_cgroup_paths_of_both_drivers() -> None:
    assert cgroups.relative("/kubepods/pod1/abc") == "kubepods/pod1/abc"
    assert cgroups.relative("kubepods-besteffort-pod1.slice:cri-containerd:abc") == (
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope"
    )


def test_the_guest_gets_addresses_and_routes_but_not_those_the_kernel_makes() -> None:
    links = [
        {
            "ifname": "eth0",
            "address": "02:00:00:00:00:01",
            "mtu": 1450,
            "addr_info": [
                {"local": "10.1.0.5", "prefixlen": 24, "scope": "global"},
                {"local": "fe80::1", "prefixlen": 64, "scope": "link"},
            ],
        }
    ]
    routes = [
        {"dst": "default", "gateway": "169.254.1.1", "dev": "eth0"},
        {"dst": "169.254.1.1", "dev": "eth0", "scope": "link"},
        {"dst": "10.1.0.0/24", "dev": "eth0", "protocol": "kernel", "prefsrc": "10.1.0.5"},
        {"dst": "10.9.0.0/16", "dev": "other"},
    ]
    found = network.describe(links, routes, (Network("tap0", "02:00:00:00:00:01", 1450),))
    assert [(one.name, one.mtu) for one in found.links] == [("eth0", 1450)]
    assert [one.prefix for one in found.addresses] == ["10.1.0.5/24"]
    assert [(one.destination, one.gateway) for one in found.routes] == [
        ("169.254.1.1", ""),
        ("default", "169.254.1.1"),
    ]


def test_metrics_have_the_form_of_the_hosts_cgroups() -> None:
    used = StatsResponse(memory_bytes=100, inactive_file_bytes=30, cpu_us=5, pids=2, guest_memory_bytes=999)
    first = stats.metrics(used, unified=False)
    assert first.type_url == "io.containerd.cgroups.v1.Metrics"
    v1 = c.MetricsV1.decode(first.value)
    assert v1.cpu is not None
    assert v1.cpu.usage is not None
    assert v1.cpu.usage.total == 5000
    assert v1.memory is not None
    assert v1.memory.total_inactive_file == 30
    second = stats.metrics(used, unified=True)
    assert second.type_url == "io.containerd.cgroups.v2.Metrics"
    v2 = c.MetricsV2.decode(second.value)
    assert v2.memory is not None
    assert (v2.memory.usage, v2.memory.usage_limit) == (100, 999)


def test_layers_are_the_lower_directories_lowest_first_and_a_written_upper_one_is_none(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    options = ["index=off", f"upperdir={upper}", "workdir=/w", "lowerdir=/top:/middle:/bottom"]
    assert layers.split([c.Mount(type="overlay", options=options)]) == ([], ["/bottom", "/middle", "/top"], "")
    (upper / "file").touch()
    assert layers.split([c.Mount(type="overlay", options=options)])[2] == str(upper)
    assert layers.split([c.Mount(type="erofs", source="/blob")]) == ([Path("/blob")], [], "")
    assert layers.split([c.Mount(type="bind", source="/view", options=["rbind", "ro"])]) == ([], ["/view"], "")
    assert layers.split([c.Mount(type="bind", source="/active", options=["rbind", "rw"])]) == ([], [], "/active")
    with pytest.raises(UnimplementedError, match="overlayfs snapshotter"):
        layers.split([c.Mount(type="zfs", source="pool")])


def test_grants_are_read_from_containers_alone() -> None:
    container = {"annotations": {"grant.remora.dev/gpu": "aa", "grant.remora.dev/cpu": "bb", "io.remora.memory": "1G"}}
    assert identity.grants({}, container) == ("bb", "aa")
    assert identity.attach_spec(settings.Settings(), {}, container).grants == ("bb", "aa")
    assert identity.grants({"annotations": {"grant.remora.dev/gpu": "forged"}}, {}) == ()


def test_what_came_with_the_pod_is_no_grant() -> None:
    """containerd that passes everything a pod's author writes puts it into the container's annotations, too."""
    pod = {"annotations": {"grant.remora.dev/gpu": "forged"}}
    assert identity.grants(pod, {"annotations": {"grant.remora.dev/gpu": "forged"}}) == ()


def test_a_root_that_can_be_written_is_packed_as_it_is_now_and_for_one_container_alone(tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    root.mkdir()
    (root / "secret").write_text("of the first")
    cache = layers.LayerCache(tmp_path / "state")
    (first,) = cache.images([], str(root), tmp_path / "first.erofs")
    assert b"of the first" in first.read_bytes()
    # Nothing that a cache by names or settable times would notice.
    (root / "secret").write_text("of another")
    (second,) = cache.images([], str(root), tmp_path / "second.erofs")
    assert b"of another" in second.read_bytes()
    assert b"of the first" not in second.read_bytes()
    assert not cache.directory.exists()


def test_what_a_killed_shim_had_packed_by_half_is_removed_by_the_next_that_packs(tmp_path: Path) -> None:
    layer = tmp_path / "snapshots" / "1" / "fs"
    layer.mkdir(parents=True)
    cache = layers.LayerCache(tmp_path / "state")
    cache.directory.mkdir(parents=True)
    (cache.directory / ".0123.erofs.4711").write_bytes(bytes(1000))
    (cache.directory / ".0123.erofs.4711.d").mkdir()
    (image,) = cache.images([c.Mount(type="overlay", options=[f"lowerdir={layer}"])], "", tmp_path / "own")
    assert sorted(path.name for path in cache.directory.iterdir()) == sorted([image.name, "lock"])


def test_another_layer_at_the_same_place_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    cache = layers.LayerCache(tmp_path / "state")
    snapshot, old = tmp_path / "snapshots" / "1", tmp_path / "old"
    mount = [c.Mount(type="overlay", options=[f"lowerdir={snapshot / 'fs'}"])]
    found = []
    for text in ("one", "two"):
        (snapshot / "fs").mkdir(parents=True)
        (snapshot / "fs" / "file").write_text(text)
        os.utime(snapshot, (1, 1))
        os.utime(snapshot / "fs", (1, 1))
        found.append(cache.images(mount, "", tmp_path / "own"))
        assert cache.images(mount, "", tmp_path / "own") == found[-1]
        if text == "one":
            snapshot.rename(old)
    assert found[0] != found[1]
    assert b"two" in found[1][0].read_bytes()
