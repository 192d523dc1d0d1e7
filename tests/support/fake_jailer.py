"""A fake of Firecracker's jailer, as a program: for hosts on which the real one's Firecracker does not run.

It does what the jailer documents (docs/jailer.md of Firecracker), with its privileges: takes its arguments and no
others, makes the layout, the limits and the cgroups, goes into a root of its own, makes the devices, becomes the user,
and runs the file. Only so that a fake of Firecracker, a Python program, runs in there, it also mounts what Python and
QEMU need into the root, for reading and in its own mount namespace.

Started as `fake_jailer.py VERSION ARGUMENT...`, which `install` wraps into a program of the jailer's name.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import resource
import shutil
import stat
import sys
from pathlib import Path
from typing import NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
_LIMITS = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}
#: What a Python program and QEMU read of the host. `sys.prefix` may be a virtual environment.
_NEEDED = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/proc/cpuinfo", sys.base_prefix)
_REPOSITORY = Path(__file__).resolve().parents[2]


def install(directory: Path, version: str) -> str:
    """Write a program that is this fake; returns its path."""
    program = directory / "jailer"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{Path(__file__).absolute()}' {version} \"$@\"\n")
    program.chmod(0o755)
    return str(program)


class _Once(argparse.Action):
    """Refuses an argument that was given already."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: object, name: object = None
    ) -> None:
        if getattr(namespace, f"_{self.dest}", False):
            parser.error(f"The argument '{self.dest}' was provided more than once.")
        setattr(namespace, f"_{self.dest}", True)
        setattr(namespace, self.dest, value)


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the jailer's arguments, checked, and those for Firecracker behind `--`."""
    own, rest = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        own, rest = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser("jailer", allow_abbrev=False)
    for required in ("--id", "--exec-file", "--uid", "--gid"):
        parser.add_argument(required, required=True, action=_Once)
    parser.add_argument("--chroot-base-dir", default="/srv/jailer", action=_Once)
    parser.add_argument("--cgroup-version", choices=["1", "2"], default="1", action=_Once)
    parser.add_argument("--parent-cgroup", action=_Once)
    parser.add_argument("--netns", action=_Once)
    parser.add_argument("--cgroup", action="append", default=[])
    parser.add_argument("--resource-limit", action="append", default=[])
    parser.add_argument("--daemonize", action="store_true")
    parser.add_argument("--new-pid-ns", action="store_true")
    options = parser.parse_args(own)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", options.id):
        _fail(f"Invalid instance ID: {options.id}")
    options.exec_file = Path(options.exec_file).resolve(strict=True)
    if "firecracker" not in options.exec_file.name:
        _fail(f'Invalid filename. The filename of `--exec-file` option must contain "firecracker": {options.exec_file}')
    # Neither is made by the jailer.
    options.base = Path(options.chroot_base_dir).resolve(strict=True)
    if options.parent_cgroup is None:
        options.parent_cgroup = options.exec_file.name
    elif options.parent_cgroup.startswith("/") or {".", ".."} & set(options.parent_cgroup.split("/")):
        _fail("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")
    options.uid, options.gid = int(options.uid), int(options.gid)
    if options.daemonize or options.new_pid_ns:
        _fail("the fake neither daemonizes nor makes a PID namespace")
    return options, rest


def main() -> None:
    version, *arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"Jailer v{version}")
        return
    os.closerange(3, 1 << 16)
    os.environ.clear()
    options, rest = _parsed(arguments)
    name = options.exec_file.name
    root: Path = options.base / name / options.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.exec_file, root)
    if options.netns is not None:
        with open(options.netns) as netns:
            _check(_libc.setns(netns.fileno(), _CLONE_NEWNET), "setns")
    limits = dict(one.split("=") for one in options.resource_limit)
    for limit, value in {"no-file": "2048", **limits}.items():
        resource.setrlimit(_LIMITS[limit], (int(value), int(value)))
    for setting in options.cgroup:
        _join_cgroup(setting, Path(options.parent_cgroup) / options.id, int(options.cgroup_version))
    _enter(root)
    for folder in ("/", "/dev", "/dev/net", "/run"):
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)
        os.chown(folder, options.uid, options.gid)
    for device, major, minor in (("/dev/net/tun", 10, 200), ("/dev/kvm", 10, 232), ("/dev/urandom", 1, 9)):
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chown(device, options.uid, options.gid)
    with open(f"/{name}.pid", "x") as file:
        file.write(str(os.getpid()))
    os.setgroups([])
    os.setgid(options.gid)
    os.setuid(options.uid)
    times = ("--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1")
    os.execv(f"/{name}", [f"/{name}", "--id", options.id, *times, *rest])


def _enter(root: Path) -> None:
    """Make `root` this process's root, in a mount namespace of its own."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    _mount(str(root), str(root), _MS_BIND)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    for needed in dict.fromkeys((*_NEEDED, str(_REPOSITORY), sys.prefix)):
        _show(Path(needed), root / needed.lstrip("/"))
    old = root / "old_root"
    old.mkdir()
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT, b".", b"old_root"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old_root", _MNT_DETACH), "umount2")
    os.rmdir("/old_root")
    os.chroot(".")


def _show(source: Path, target: Path) -> None:
    """Have the jail see a file or a directory of the host, for reading."""
    if not os.path.lexists(source) or os.path.lexists(target):
        return
    os.umask(0o022)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    _mount(str(source), str(target), _MS_BIND)
    _mount("none", str(target), _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def _join_cgroup(setting: str, below: Path, version: int) -> None:
    file, value = setting.split("=")
    controller, _, what = file.partition(".")
    if not what or (version == 1 and "." in what):
        _fail(f"Cgroup invalid file: {file}")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted_on, kind, options, *_ = line.split()
        if kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(","):
            break
    else:
        _fail(f"Controller {controller} is unavailable")
    if version == 2:
        for part in reversed(below.parents):
            (Path(mounted_on) / part).mkdir(exist_ok=True)
            (Path(mounted_on) / part / "cgroup.subtree_control").write_text(f"+{controller}")
    group = Path(mounted_on) / below
    group.mkdir(parents=True, exist_ok=True)
    (group / file).write_text(value)
    (group / ("tasks" if version == 1 else "cgroup.procs")).write_text(str(os.getpid()))


def _mount(source: str, target: str, flags: int) -> None:
    _check(_libc.mount(source.encode(), target.encode(), None, flags, None), f"mount {target}")


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _fail(message: str) -> NoReturn:
    print(f"Jailer error: {message}")
    sys.exit(1)


if __name__ == "__main__":
    main()
