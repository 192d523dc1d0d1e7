#!/bin/busybox sh
# Brings the guest from the initrd to its OS disk: every process costs 5 ms under emulation, so this starts as few as it
# can (one modprobe for all modules, one mount for all file systems) and leaves the rest to PID 1.
B=/bin/busybox
ulimit -n 16384 # three descriptors for each connection to the accelerator
fail() { echo "remora: $1"; $B reboot -f; }
$B mount -t devtmpfs dev /dev
$B mount -t sysfs sys /sys
# The kernel hands arguments that it does not know to init: remora_net=1, remora_vsock=1, remora_disks=remora-os,l00.
$B modprobe -a $($B cat /modules ${remora_pod:+/modules.pod} ${remora_vsock:+/modules.vsock}) || fail "a kernel module did not load"
disk= tries=0
while [ -z "$disk" ]; do
  for block in /sys/block/vd*; do
    serial=
    read -r serial 2>/dev/null <"$block/serial"
    [ "$serial" = remora-os ] || [ "$block:${remora_disks%%,*}" = /sys/block/vda:remora-os ] && disk=/dev/${block##*/}
  done
  tries=$((tries + 1))
  [ -n "$disk" ] || { [ $tries -lt 500 ] || fail "no disk with serial remora-os"; $B usleep 10000; }
done
$B mount -t erofs -o ro "$disk" /new || fail "the OS disk $disk does not mount"
$B mount -a -T /fstab
exec $B switch_root /new /usr/bin/python3 -I -S -c 'from remora.guest.main import main; main()'
