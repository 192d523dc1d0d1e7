"""What the node allows, as one value that is read once and checked before the first socket is opened.

Every number by which a guest could make the agent wait, grow or fill a disk has a name here, and the error that
refuses a request says that name: whoever reads the refusal knows which key of the configuration file to talk about.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remora.agent.rules import Rules, parse_rules, shown
from remora.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError
from remora.workers.settings import WorkerSettings

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Section `[limits]`: what connections, sessions and requests may use."""

    #: Connections of all tenants together.
    connections: int = 16384
    connections_per_tenant: int = 1024
    sessions_per_tenant: int = 1024
    #: Largest message body a client may send.
    message_bytes: int = 64 * MIB
    #: Longest JSON text of a request or an answer (Open Inference Protocol). Parsing takes up to ten times its length
    #: in memory, and the agent's time.
    json_bytes: int = 4 * MIB
    #: Bodies that were received for a tenant and are not answered yet.
    in_flight_bytes_per_tenant: int = 256 * MIB
    #: The same of all tenants together; 0: a quarter of the machine's memory. Past half of it shares are equal.
    in_flight_bytes: int = 0
    #: Memory shared with clients of this host, whose tensors then cross no socket; 0: none.
    shared_bytes_per_connection: int = 64 * MIB
    shared_bytes_per_tenant: int = 512 * MIB
    #: Requests of one connection that are not answered yet.
    in_flight_per_connection: int = 256
    #: Requests of a tenant that wait for a worker.
    queue_length_per_tenant: int = 256
    #: Answers that wait for a reader who does not read.
    out_bytes_per_connection: int = 128 * MIB
    #: What the kernel keeps of them: an answer that fits is sent at once, without waiting for its reader. The default
    #: takes an image model's tensor (588 KiB), which the kernel's own 208 KiB would make three turns of the loop.
    send_buffer_bytes: int = MIB
    #: A message must be complete this long after its first byte.
    frame_timeout_s: int = 30
    #: A connection must open a session this long after it was made.
    hello_timeout_s: int = 30
    #: TLS handshakes under way; the one that has taken longest gives way to a new one.
    handshakes: int = 256
    #: A TLS handshake must be done this long after the connection was made.
    handshake_timeout_s: int = 5
    #: A connection without any request is closed after this long.
    idle_timeout_s: int = 3600
    #: A request without a deadline, or with a later one, gets this one.
    request_timeout_s: int = 300
    #: How long a session outlives its last connection.
    lease_s: int = 300
    #: Answers remembered for requests that are sent again.
    answers_per_tenant: int = 256
    answer_bytes_per_tenant: int = 4 * MIB
    #: Models that one session may have loaded at once.
    models_per_session: int = 16
    #: SIGTERM lets what runs finish for this long.
    drain_timeout_s: int = 10
    #: Resources and unfinished uploads of one tenant.
    resources_per_tenant: int = 256


@dataclass(frozen=True)
class StoreLimits:
    """Section `[store]`: what uploads may fill."""

    #: Bytes a tenant may store, unfinished uploads counted by their announced size.
    tenant_bytes: int = 4 * GIB
    #: Bytes of all tenants together.
    total_bytes: int = 32 * GIB
    #: A resource that no session holds is removed this long after its last use.
    max_age_s: int = 7 * 24 * 3600
    #: An unfinished upload is removed this long after its last chunk.
    partial_age_s: int = 24 * 3600


@dataclass(frozen=True)
class FleetSettings:
    """Section `[fleets]`: others' microVMs that the agent finds and serves."""

    #: As `--attach` has them.
    attach: tuple[str, ...] = ()
    #: Where containerd has its state, and in it the names of sandboxes.
    containerd: str = "/run/containerd"


@dataclass(frozen=True)
class Policy:
    limits: Limits = field(default_factory=Limits)
    store: StoreLimits = field(default_factory=StoreLimits)
    #: Section `[workers]`.
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    fleets: FleetSettings = field(default_factory=FleetSettings)
    #: Sections `[defaults]`, `[tenant.NAME]` and `[[label]]`: what tenants may do (docs/policy.md).
    rules: Rules = field(default_factory=Rules)


Section = Limits | StoreLimits | WorkerSettings | FleetSettings
_SECTIONS: dict[str, type[Section]] = {
    "limits": Limits,
    "store": StoreLimits,
    "workers": WorkerSettings,
    "fleets": FleetSettings,
}
#: Largest configuration file; it must fit into an answer on the control socket.
_MOST_BYTES = 512 * KIB
_RULES = ("defaults", "label", "tenant")
#: Smallest value of a whole number, where 1 would make the agent useless or 0 has a meaning.
_LEAST: dict[str, int] = {
    "message_bytes": 4 * MIB,
    "out_bytes_per_connection": 4 * KIB,
    "send_buffer_bytes": 4 * KIB,
    "in_flight_bytes": 0,
    "shared_bytes_per_connection": 0,
    "shared_bytes_per_tenant": 0,
    "standby": 0,
    "device_memory_bytes": 0,
    "calibrate_ms": 0,
    "tenant_memory_bytes": 0,
    "shared_memory_bytes": 0,
}


def _check_value(where: str, key: str, value: object, default: object) -> None:
    """Refuse a value that is not of its default's kind."""
    if isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        good, wanted = isinstance(value, str), "a text in quotes"
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
        wanted = "a number above 0"
    elif isinstance(default, tuple):
        good = isinstance(value, list) and all(isinstance(one, str) for one in value)
        wanted = "a list of texts"
    else:
        least = _LEAST.get(key, 1)
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 53
        wanted = f"a whole number of at least {least}"
    if not good:
        raise InvalidArgumentError(
            f"{where}: {key} = {shown(value)} is not {wanted}", fix="sizes are in bytes and times in seconds"
        )


def _section(name: str, values: object, where: str) -> Section:
    cls = _SECTIONS[name]
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f"{where}: `{name}` is not a section", fix=f"write `[{name}]` and its keys below it")
    defaults = asdict(cls())
    for key, value in values.items():
        if key not in defaults:
            raise InvalidArgumentError(
                f"{where}: [{name}] has no key `{key}`", fix=f"the keys are {', '.join(sorted(defaults))}"
            )
        _check_value(f"{where}: [{name}]", key, value, defaults[key])
    checked: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return cls(**checked)


def parse(text: str, where: str = "the configuration") -> Policy:
    """Return the policy that `text` (TOML) states; what it leaves out has its default.

    Raises:
        InvalidArgumentError: not TOML, an unknown section or key, a value out of range.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise InvalidArgumentError(f"{where} is not TOML: {error}", fix="see docs/agent.md for an example") from error
    unknown = sorted(set(document) - set(_SECTIONS) - set(_RULES))
    if unknown:
        raise InvalidArgumentError(
            f"{where} has no section `{unknown[0]}`", fix=f"the sections are {', '.join(sorted((*_SECTIONS, *_RULES)))}"
        )
    sections: dict[str, Any] = {
        name: _section(name, values, where) for name, values in document.items() if name in _SECTIONS
    }
    return Policy(**sections, rules=parse_rules(document, where, Path(where).name))


def load(path: Path | None) -> Policy:
    """Read the configuration file; no path means the defaults."""
    return Policy() if path is None else parse(read(path), str(path))


def read(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        RemoraError: it cannot be read, or is larger than any sensible one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise InvalidArgumentError(
                f"the configuration file {path} is larger than {_MOST_BYTES} bytes", fix="match tenants by label"
            )
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise FailedPreconditionError(
            f"the configuration file {path} does not exist", fix="leave --config out for the defaults"
        ) from error
    except PermissionError as error:
        raise PermissionDeniedError(f"the configuration file {path} is not readable", fix=f"chmod +r {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"the configuration file {path} is not readable text: {error}", fix="give a TOML file"
        ) from error
