"""The OCI bundle that crun runs: a pure function from a process and its user to config.json.

The microVM is the boundary, so the container inside is a convenience: namespaces, an unprivileged set of capabilities
and masked kernel files keep a function from hurting its own guest by accident. Network and host name are the guest's
own: there is nothing to separate them from, and the name must follow a clone's new identity.
Format: opencontainers/runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

from _json import encode_basestring_ascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from remora.guest.users import User
    from remora.wire.guest_v1 import Process

CGROUP = "/remora/main"
#: The accelerator's door and the SDK, as the container sees them.
ADDRESS = "unix:///run/remora/accel.sock"
SDK = "/run/remora/sdk"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What container engines commonly grant; root in the image needs them to install, change owner and bind low ports.
_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
_MASKED = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"]
_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def _mount(kind: str, destination: str, *options: str, source: str = "") -> Dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def bind(source: str, destination: str, readonly: bool) -> Dict[str, Any]:
    return _mount("bind", destination, "rbind", "ro" if readonly else "rw", "nosuid", "nodev", source=source)


def environment(process: Process, user: User) -> List[str]:
    """Return the process's environment: what was asked for, and what every process here can count on."""
    wanted = dict(entry.partition("=")[::2] for entry in process.env)
    defaults = {"PATH": DEFAULT_PATH, "HOME": user.home, "REMORA_ADDRESS": ADDRESS, "VACCEL_RPC_ADDRESS": ADDRESS}
    if process.terminal:
        defaults["TERM"] = "xterm"
    python_path = wanted.get("PYTHONPATH", "")
    if SDK not in python_path.split(":"):
        # Last: an image that has a remora of its own uses that one.
        wanted["PYTHONPATH"] = f"{python_path}:{SDK}" if python_path else SDK
    return [f"{name}={value}" for name, value in {**defaults, **wanted}.items()]


def process_json(process: Process, user: User) -> Dict[str, Any]:
    """Return the `process` object: of config.json for the container, or alone for an exec."""
    env = environment(process, user)
    value: Dict[str, Any] = {
        "terminal": process.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": list(process.args),
        "env": env,
        "cwd": process.cwd or "/",
        "noNewPrivileges": True,
        "capabilities": _capabilities(user),
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288}],
    }
    if process.terminal:
        value["consoleSize"] = {"height": process.rows or 24, "width": process.columns or 80}
    return value


def _capabilities(user: User) -> Dict[str, List[str]]:
    held = _CAPABILITIES if user.uid == 0 else []
    return {"bounding": _CAPABILITIES, "effective": held, "permitted": held, "inheritable": [], "ambient": []}


def config_json(process: Dict[str, Any], mounts: List[Dict[str, Any]], readonly_root: bool, limit: int) -> str:
    """Return config.json.

    Args:
        process: of `process_json`.
        mounts: mounts beyond the usual ones, in order.
        readonly_root: the root itself cannot be written.
        limit: memory of the container in bytes: what the guest has less what PID 1 needs.
    """
    return encode(
        {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": "rootfs", "readonly": readonly_root},
            "mounts": [
                _mount("proc", "/proc", "nosuid", "noexec", "nodev"),
                _mount("tmpfs", "/dev", "nosuid", "strictatime", "mode=755", "size=65536k"),
                _mount("devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
                _mount("tmpfs", "/dev/shm", "nosuid", "noexec", "nodev", "mode=1777"),
                _mount("mqueue", "/dev/mqueue", "nosuid", "noexec", "nodev"),
                _mount("sysfs", "/sys", "nosuid", "noexec", "nodev", "ro"),
                _mount("tmpfs", "/run", "nosuid", "nodev", "mode=755"),
                *mounts,
            ],
            "linux": {
                "cgroupsPath": CGROUP,
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "mount", "cgroup")],
                "resources": {
                    # The guest's own disks and channel are not for the function, root or not; crun adds null, tty, ...
                    "devices": [{"allow": False, "access": "rwm"}],
                    "memory": {"limit": limit},
                },
                "maskedPaths": _MASKED,
                "readonlyPaths": _READONLY,
            },
        }
    )


def encode(value: Any) -> str:
    """Return JSON text. Python's own module imports `re`, which costs the guest 30 ms."""
    if isinstance(value, str):
        return str(encode_basestring_ascii(value))
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode(key)}:{encode(item)}" for key, item in value.items()) + "}"
    return "[" + ",".join(map(encode, value)) + "]"
