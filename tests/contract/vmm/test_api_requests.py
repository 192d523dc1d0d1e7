"""Every request that a driver can send is one that the monitor's own API description allows, for each release."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import vmm_api
from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.vmm import cloud_hypervisor, jail
from remora.vmm import firecracker_api as fc
from remora.vmm.api import MAX_BODY_BYTES, Request, reason
from remora.vmm.contract import Disk, Network, Rate, VmSpec

RELEASES = ("0.23.1", "0.24.0", "0.25.0", "1.0.0", "1.1.0", "1.4.0", "1.12.0", "1.14.0", "1.15.0", "1.16.0", "1.16.1")
VERSIONS = [fc.parse_version(text) for text in (*RELEASES, "1.17.0")]
SAFE_RESTORE = [version for version in VERSIONS if version >= (0, 25, 0) and version != (1, 16, 0)]
FILES = fc.Files("/k/vmlinux", "/k/initrd", ("/d/os", "/d/layer"))
RATES = (Rate(), Rate(1 << 20), Rate(0, 100), Rate(1 << 20, 100))


def spec(**changes: Any) -> VmSpec:
    plain = VmSpec(
        kernel=Path("/k/vmlinux"),
        initrd=Path("/k/initrd"),
        arguments="console=ttyS0 quiet",
        memory_mib=256,
        cpus=2,
        accelerator="kvm",
        disks=(Disk("remora-os", Path("/d/os")), Disk("l00", Path("/d/layer"), readonly=False)),
    )
    return plain._replace(**changes)


def specs() -> list[VmSpec]:
    """Every combination of what a machine can have."""
    networks = [(), *((Network("tap0", "02:00:00:00:00:01", mtu, rx, Rate()),) for mtu in (1500, 9000) for rx in RATES)]
    disks = [spec().disks, *(tuple(d._replace(rate=rate) for d in spec().disks) for rate in RATES)]
    return [
        spec(networks=n, disks=d, reclaim=r, cpus=c)
        for n, d, r, c in itertools.product(networks, disks, (False, True), (1, 32))
    ]


def valid(description: vmm_api.ApiDescription, requests: tuple[Request, ...]) -> None:
    for request in requests:
        refused = description.check(*request)
        assert refused is None, f"{request}: {refused.message}"


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_firecracker_takes_every_configuration(version: fc.Version) -> None:
    description = vmm_api.firecracker(version)
    sent = 0
    for machine in specs():
        if machine.reclaim and version < (1, 14, 0):
            with pytest.raises(FailedPreconditionError, match="takes no memory back"):
                fc.boot_requests(machine, version, FILES)
            continue
        requests = fc.boot_requests(machine, version, FILES)
        valid(description, requests)
        assert requests[-1].body == {"action_type": "InstanceStart"}
        sent += len(requests)
    assert sent > 500


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_firecracker_takes_every_call_of_a_running_machine(version: fc.Version) -> None:
    description = vmm_api.firecracker(version)
    valid(description, (fc.pause(), fc.resume()))
    if version >= (0, 24, 0):
        valid(description, (fc.balloon_request(64, version), fc.balloon_request(0, version)))
    else:
        with pytest.raises(FailedPreconditionError, match="no balloon"):
            fc.balloon_request(64, version)


@pytest.mark.parametrize("version", SAFE_RESTORE, ids=str)
def test_firecracker_takes_every_snapshot_call(version: fc.Version) -> None:
    description = vmm_api.firecracker(version)
    valid(description, fc.save_requests(version, state="/s", memory="/m"))
    valid(description, fc.restore_requests(version, state="/s", memory="/m"))
    if version >= (1, 12, 0):
        valid(description, fc.restore_requests(version, state="/s", memory="/m", taps=["tap1"]))
    else:
        with pytest.raises(FailedPreconditionError, match="tap of its own"):
            fc.restore_requests(version, state="/s", memory="/m", taps=["tap1"])


@pytest.mark.parametrize("version", [fc.Version(0, 23, 1), fc.Version(0, 24, 0), fc.Version(1, 16, 0)], ids=str)
def test_releases_that_lose_a_restored_guests_channel_take_no_snapshots(version: fc.Version) -> None:
    with pytest.raises(FailedPreconditionError, match="install Firecracker"):
        fc.save_requests(version, state="/s", memory="/m")


def test_the_config_file_holds_what_the_calls_say() -> None:
    machine = spec(networks=(Network("tap0", "02:00:00:00:00:01"),), reclaim=True)
    version = fc.Version(1, 17)
    config = fc.config_file(machine, version, FILES)
    calls = {request.path.strip("/").partition("/")[0] for request in fc.boot_requests(machine, version, FILES)}
    assert set(config) == calls - {"actions"}
    assert [drive["path_on_host"] for drive in config["drives"]] == list(FILES.disks)
    assert set(config) <= {
        "boot-source",
        "drives",
        "machine-config",
        "network-interfaces",
        "vsock",
        "balloon",
        "entropy",
    }


def test_an_unknown_or_too_old_release_is_refused_by_name() -> None:
    assert fc.parse_version("Firecracker v1.16.1\n") == fc.Version(1, 16, 1)
    assert fc.parse_version("v0.23.1") == fc.OLDEST
    with pytest.raises(FailedPreconditionError, match=r"0\.22\.0 is too old"):
        fc.parse_version("Firecracker v0.22.0")
    with pytest.raises(FailedPreconditionError, match="does not tell its version"):
        fc.parse_version("command not found")


@pytest.mark.parametrize(("version", "most"), [((0, 23, 1), 10), ((1, 3, 0), 18), ((1, 17, 0), 15)])
def test_more_disks_than_a_release_has_slots_are_refused(version: tuple[int, int, int], most: int) -> None:
    release = fc.Version(*version)
    disks = tuple(Disk(f"l{number:02}", Path("/d")) for number in range(most))
    fc.check(spec(disks=disks), release)
    with pytest.raises(InvalidArgumentError, match="fewer layers"):
        fc.check(spec(disks=(*disks, Disk("more", Path("/d")))), release)


def test_a_whole_machine_fits_firecrackers_longest_request() -> None:
    # The only body whose length grows with what a user asks for is the kernel command line.
    longest = max(specs(), key=lambda machine: len(str(machine)))
    for request in fc.boot_requests(longest, fc.Version(1, 17), FILES):
        assert len(str(request.body)) < MAX_BODY_BYTES / 10


def test_cloud_hypervisor_takes_every_configuration() -> None:
    description = vmm_api.cloud_hypervisor()
    for machine in specs():
        config = cloud_hypervisor.vm_config(machine, Path("/run/x/channel.sock"))
        valid(description, (cloud_hypervisor.put("vm.create", config),))


def test_cloud_hypervisors_clones_get_their_own_channel_and_taps() -> None:
    template = spec(networks=(Network("tap0", "02:00:00:00:00:01"),))
    config = cloud_hypervisor.vm_config(template, Path("/t/channel.sock"))
    clone = template._replace(networks=(Network("tap7", "02:00:00:00:00:01"),))
    own = cloud_hypervisor.for_clone(config, clone, Path("/c/channel.sock"))
    assert own["vsock"]["socket"] == "/c/channel.sock"
    assert [net["tap"] for net in own["net"]] == ["tap7"]
    valid(vmm_api.cloud_hypervisor(), (cloud_hypervisor.put("vm.create", own),))


def test_one_limiter_for_both_directions_keeps_the_narrower_promise() -> None:
    network = Network("tap0", "02:00:00:00:00:01", receive=Rate(1000, 0), send=Rate(500, 7))
    config = cloud_hypervisor.vm_config(spec(networks=(network,)), Path("/c"))
    assert config["net"][0]["rate_limiter_config"] == {
        "bandwidth": {"size": 500, "refill_time": 1000},
        "ops": {"size": 7, "refill_time": 1000},
    }


def test_the_jailers_command_line_names_every_bound() -> None:
    made = jail.Jail(
        Path("/srv/j"),
        "box-1",
        Path("/usr/bin/firecracker"),
        uid=1000,
        gid=1001,
        parent_cgroup="kubepods/pod1",
        cgroups=("memory.max=300000000",),
        netns=Path("/run/netns/n1"),
    )
    line = " ".join(jail.command_line(made, "/usr/bin/jailer"))
    assert line == (
        "/usr/bin/jailer --id box-1 --exec-file /usr/bin/firecracker --uid 1000 --gid 1001 --chroot-base-dir /srv/j"
        " --cgroup-version 2 --parent-cgroup kubepods/pod1 --cgroup memory.max=300000000 --netns /run/netns/n1"
        " --resource-limit no-file=2048 -- --api-sock /api.sock"
    )
    assert made.root == Path("/srv/j/firecracker/box-1/root")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"fault_message": "no root"}', "no root"),
        (b'{"error": "too long"}', "too long"),
        (b'["outer", "inner"]', "outer: inner"),
        (b"plain text\n", "plain text"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_an_errors_own_words_are_found_in_each_form(body: bytes, words: str) -> None:
    assert reason(body) == words
