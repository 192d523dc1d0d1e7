"""What a VMM must hand to the guest: kernel arguments and the names by which the guest finds its devices.

Pure functions and constants, here beside the code that reads them. The reasons for each argument were measured under
emulation (docs/guest.md); a wrong set does not boot slower, it hangs.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Sequence

#: Serial of the virtio-blk disk that holds the guest OS.
OS_DISK_SERIAL = "remora-os"
#: Name of the virtio-serial port that carries the channel.
CHANNEL_PORT_NAME = "remora.0"
#: A virtio-blk serial has room for no more (struct virtio_blk_req, VIRTIO_BLK_ID_BYTES).
MAX_SERIAL_BYTES = 20
#: Kernel argument by which PID 1 learns that `remora.ready()` is to block until Resume.
TEMPLATE_ARGUMENT = "remora.template=1"
#: Kernel argument that has init load the drivers that only pods need: network cards, and the balloon by which freed
#: memory goes back. Without a dot: then it is an environment variable of init.
POD_ARGUMENT = "remora_pod=1"
#: Likewise: the channel is on vsock and not on a virtio-serial port.
VSOCK_ARGUMENT = "remora_vsock=1"
#: Likewise: the disks' serials in the order of their devices, for monitors that give a disk no serial of ours.
DISKS_ARGUMENT = "remora_disks="

#: Death of PID 1 ends the VM: panic reboots at once, by triple fault, and the VMM exits instead (QEMU: -no-reboot).
_ALWAYS = ("panic=-1", "reboot=t", "audit=0", "random.trust_cpu=on", "cryptomgr.notests", "rcupdate.rcu_expedited=1")
#: Only where the CPU is emulated: boot time (KASLR, mitigations) and a timer check that a busy host fails.
_EMULATED = ("tsc=reliable", "nokaslr", "mitigations=off", "no_timer_check")


def kernel_arguments(
    tsc_khz: Optional[int],
    *,
    console: bool = False,
    template: bool = False,
    vsock: bool = False,
    disks: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> str:
    """Return the guest's kernel command line.

    Args:
        tsc_khz: The host's TSC rate where the CPU is emulated: without it the kernel calibrates against a timer that a
            busy host disturbs, and hangs in most boots. None under KVM, which has a clock of its own.
        console: Print the kernel's messages on ttyS0. PID 1's own errors go there either way.
        template: `remora.ready()` blocks until the host sends Resume.
        vsock: The monitor gives the guest a vsock device (Firecracker, Cloud Hypervisor).
        disks: The disks' serials in their order, where the monitor does not tell the guest serials (Firecracker).
        extra: Further arguments, for tests and debugging.
    """
    arguments: List[str] = ["console=ttyS0"]
    if not console:
        arguments += ["quiet", "loglevel=3"]
    arguments += _ALWAYS
    if tsc_khz is not None:
        arguments.append(f"tsc_early_khz={tsc_khz}")
        arguments += _EMULATED
    if template:
        arguments.append(TEMPLATE_ARGUMENT)
    if vsock:
        arguments.append(VSOCK_ARGUMENT)
    if disks:
        arguments.append(DISKS_ARGUMENT + ",".join(disks))
    arguments += extra
    return " ".join(arguments)


def host_tsc_khz(cpuinfo: str) -> Optional[int]:
    """Return the TSC rate by `/proc/cpuinfo`'s text; None if it does not say. Right where the CPU clock is fixed."""
    for line in cpuinfo.splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.partition(":")[2]) * 1000)
    return None
