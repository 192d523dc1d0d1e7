"""The runtime's settings: `/etc/remora/runtime.toml`, or the file that containerd's configuration names (ConfigPath).

    [vm]
    memory = "512M"          # of a pod that states no limit
    cpus = 1
    max_memory = "64G"       # what annotations and limits may ask for
    max_cpus = 64
    scratch = "10G"          # writable layers and emptyDirs, sparse; "0": in the guest's memory
    boot_timeout = "60s"
    kill_timeout = "60s"     # a microVM in which a killed process has not ended by then is ended itself

    [accelerator]
    enabled = true
    control = "/run/remora/control.sock"

A pod may ask for less or more within these bounds by annotations: io.remora.memory, io.remora.cpus, io.remora.tenant,
io.remora.accelerator ("false": none), and io.remora.label.<name> for the agent's policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from remora import paths
from remora.errors import InvalidArgumentError
from remora.sandboxes.options import parse_duration_s, parse_size_mib
from remora.wire.containerd import RuntimeOptions
from remora.wire.ttrpc.messages import Any as AnyMessage

DEFAULT_FILE = Path("/etc/remora/runtime.toml")
#: What the guest's kernel and PID 1 take of the machine's memory, besides the pod's limit.
GUEST_OVERHEAD_MIB = 96
#: With less the guest's kernel does not come up.
MIN_MEMORY_MIB = 128
_MEMORY = "io.kubernetes.cri.sandbox-memory"
_QUOTA, _PERIOD = "io.kubernetes.cri.sandbox-cpu-quota", "io.kubernetes.cri.sandbox-cpu-period"


class Settings(NamedTuple):
    memory_mib: int = 512
    cpus: int = 1
    max_memory_mib: int = 64 << 10
    max_cpus: int = 64
    scratch_mib: int = 10 << 10
    boot_timeout_s: float = 60.0
    kill_timeout_s: float = 60.0
    accelerator: bool = True
    control_socket: Path | None = None


def load(options: AnyMessage | None) -> Settings:
    """Return the settings that containerd's options name; the defaults where they name none.

    Raises:
        InvalidArgumentError: the file cannot be read, or says something unknown.
    """
    path, text = DEFAULT_FILE, ""
    named = False
    if options is not None and options.value and "Options" in options.type_url:
        given = RuntimeOptions.decode(options.value)
        text = bytes(given.config_body).decode()
        if given.config_path:
            path, named = Path(given.config_path), True
    if not text:
        try:
            text = path.read_text()
        except FileNotFoundError as error:
            if named:
                raise InvalidArgumentError(
                    f"the runtime's settings {path} do not exist",
                    fix="correct ConfigPath in containerd's configuration",
                ) from error
    try:
        return parse(text)
    except (InvalidArgumentError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"the runtime's settings {path}: {error}") from error


def parse(text: str) -> Settings:
    settings = Settings()
    if not text:
        return settings
    # Half a MiB, which a node without settings of its own saves in each pod.
    import tomllib

    table = tomllib.loads(text)
    for section, entries in table.items():
        for key, value in entries.items() if isinstance(entries, dict) else [("", entries)]:
            settings = _set(settings, f"{section}.{key}" if key else section, value)
    return settings


def _set(settings: Settings, key: str, value: Any) -> Settings:
    match key:
        case "vm.memory":
            return settings._replace(memory_mib=parse_size_mib(value))
        case "vm.cpus":
            return settings._replace(cpus=int(value))
        case "vm.max_memory":
            return settings._replace(max_memory_mib=parse_size_mib(value))
        case "vm.max_cpus":
            return settings._replace(max_cpus=int(value))
        case "vm.scratch":
            return settings._replace(scratch_mib=parse_size_mib(value))
        case "vm.boot_timeout":
            return settings._replace(boot_timeout_s=parse_duration_s(value))
        case "vm.kill_timeout":
            return settings._replace(kill_timeout_s=parse_duration_s(value))
        case "accelerator.enabled":
            return settings._replace(accelerator=bool(value))
        case "accelerator.control":
            return settings._replace(control_socket=Path(value))
        case _:
            raise InvalidArgumentError(f"the setting {key} is unknown", fix="see docs/kubernetes.md")


class Size(NamedTuple):
    memory_mib: int
    cpus: int


def size(settings: Settings, config: dict[str, Any]) -> Size:
    """Return a microVM's size: by annotation, else by the pod's limits, else the default.

    Raises:
        InvalidArgumentError: less than a guest boots with, or more than the settings allow.
    """
    annotations = config.get("annotations") or {}
    resources = (config.get("linux") or {}).get("resources") or {}
    memory_mib, cpus = settings.memory_mib, settings.cpus
    limit = int(annotations.get(_MEMORY) or 0) or int((resources.get("memory") or {}).get("limit") or 0)
    if limit > 0:
        memory_mib = max(-(-limit // (1 << 20)) + GUEST_OVERHEAD_MIB, MIN_MEMORY_MIB)
    cpu = resources.get("cpu") or {}
    quota = int(annotations.get(_QUOTA) or 0) or int(cpu.get("quota") or 0)
    period = int(annotations.get(_PERIOD) or 0) or int(cpu.get("period") or 100000)
    if quota > 0:
        cpus = -(-quota // period)
    if "io.remora.memory" in annotations:
        try:
            memory_mib = parse_size_mib(annotations["io.remora.memory"])
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"the annotation io.remora.memory: {error.message}", fix=error.fix) from error
    if "io.remora.cpus" in annotations:
        cpus = _count(annotations["io.remora.cpus"])
    if not MIN_MEMORY_MIB <= memory_mib <= settings.max_memory_mib or not 1 <= cpus <= settings.max_cpus:
        raise InvalidArgumentError(
            f"a microVM of {memory_mib} MiB and {cpus} CPUs was asked for; "
            f"this node allows {MIN_MEMORY_MIB} to {settings.max_memory_mib} MiB and 1 to {settings.max_cpus} CPUs",
            fix="ask for what it allows (io.remora.memory, io.remora.cpus, the pod's limits), or raise vm.max_memory "
            "and vm.max_cpus in the runtime's settings",
        )
    return Size(memory_mib, cpus)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidArgumentError(f"the annotation io.remora.cpus is {text[:40]!r}", fix="write a number, like 2")
    return int(text)


def control_socket(settings: Settings) -> Path:
    return settings.control_socket or paths.control_socket()
