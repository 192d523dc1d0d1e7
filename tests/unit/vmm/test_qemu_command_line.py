"""The command line is the whole contract with QEMU: these are its golden forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from remora.errors import InvalidArgumentError
from remora.vmm.contract import Disk, Network, Rate, Slot, VmSpec
from remora.vmm.qemu import MAX_DEVICES, MAX_DISKS, command_line

SPEC = VmSpec(
    kernel=Path("/os/kernel"),
    initrd=Path("/os/initrd"),
    arguments="console=ttyS0 quiet",
    memory_mib=256,
    cpus=2,
    accelerator="tcg",
    disks=(Disk("remora-os", Path("/os/disk")), Disk("l00", Path("/images/a,b.erofs"))),
)


def line(spec: VmSpec) -> str:
    return " ".join(command_line(spec, qmp_fd=10, console_fd=11, channel_fd=12))


def test_an_emulated_machine() -> None:
    assert line(SPEC) == (
        "qemu-system-x86_64 -machine microvm,x-option-roms=off"
        " -accel tcg,thread=multi,tb-size=64 -cpu max -smp 2 -m 256M"
        " -nodefaults -no-user-config -display none -no-reboot"
        " -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
        " -kernel /os/kernel -initrd /os/initrd -append console=ttyS0 quiet"
        " -chardev socket,id=qmp,fd=10 -mon chardev=qmp,mode=control"
        " -chardev socket,id=console,fd=11 -serial chardev:console"
        " -device virtio-serial-device,max_ports=2"
        " -chardev socket,id=channel,fd=12 -device virtserialport,chardev=channel,name=remora.0"
        " -drive id=d0,file=/os/disk,format=raw,if=none,readonly=on"
        " -device virtio-blk-device,drive=d0,serial=remora-os"
        " -drive id=d1,file=/images/a,,b.erofs,format=raw,if=none,readonly=on"
        " -device virtio-blk-device,drive=d1,serial=l00"
    )


def test_kvm_uses_the_hosts_cpu_and_clock() -> None:
    assert "-machine microvm,x-option-roms=off,rtc=off -accel kvm -cpu host" in line(SPEC._replace(accelerator="kvm"))


def test_a_template_shares_its_memory_file_and_a_clone_does_not() -> None:
    template = SPEC._replace(ram_file=Path("/t/ram"))
    shared = "-object memory-backend-file,id=ram,size=256M,mem-path=/t/ram,share=on"
    assert ",memory-backend=ram " in line(template)
    assert shared in line(template)
    assert "-incoming" not in line(template)
    clone = line(template._replace(ram_private=True, incoming=True))
    assert clone == line(template).replace("share=on", "share=off") + " -incoming defer"


def test_a_pods_machine_has_slots_a_writable_disk_a_card_and_gives_memory_back() -> None:
    pod = SPEC._replace(
        disks=(*SPEC.disks, Disk("scratch", Path("/pod/scratch"), readonly=False)),
        slots=(Slot("r00"),),
        networks=(Network("tap0", "02:00:00:00:00:01"),),
        reclaim=True,
    )
    text = line(pod)
    assert "file=/pod/scratch,format=raw,if=none,readonly=off,cache=unsafe,discard=unmap" in text
    assert '"node-name": "r00", "read-only": true' in text
    assert "virtio-blk-device,drive=r00,serial=r00" in text
    assert "tap,id=n0,ifname=tap0,script=no,downscript=no" in text
    assert "virtio-net-device,netdev=n0,mac=02:00:00:00:00:01" in text
    assert "virtio-balloon-device,free-page-reporting=on" in text


def test_without_being_asked_there_is_no_network_device_and_no_writable_disk() -> None:
    assert "net" not in line(SPEC)
    assert line(SPEC).count("-drive") == line(SPEC).count("readonly=on")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SPEC._replace(memory_mib=16), "16 MiB of memory is too small"),
        (SPEC._replace(cpus=0), "0 CPUs"),
        (SPEC._replace(disks=(Disk("l00", Path("/x")),) * (MAX_DISKS + 1)), f"a microVM takes {MAX_DISKS}"),
        (SPEC._replace(disks=(Disk("x" * 21, Path("/x")),)), "more than 20"),
        (SPEC._replace(slots=(Slot("s"),) * MAX_DEVICES), f"a microVM takes {MAX_DEVICES}"),
        (SPEC._replace(networks=(Network("t", "m", send=Rate(1)),)), "does not bound a network's rate"),
        (SPEC._replace(ram_file=Path("/t/ram"), reclaim=True), "nothing can be given back"),
    ],
)
def test_what_the_machine_cannot_hold_is_refused_with_the_bound(spec: VmSpec, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        line(spec)
