"""What policy grants to whom: rules for everyone, by label and by tenant, put together into terms.

Later rules win key by key: `[defaults]`, then every `[[label]]` that matches, in file order, then the tenant's own
table. Each value remembers the table it came from, so that a refusal can name it. Values only: no clocks, no counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from remora.agent.hints import with_retry
from remora.agent.tickets import EVERYONE, Share
from remora.errors import InvalidArgumentError, PermissionDeniedError, RemoraError, ResourceExhaustedError

#: Key -> (default, least, most, what it must be). A default of None: no bound but the node's own.
KEYS: dict[str, tuple[Any, float, float, str]] = {
    "operations": (("*",), 0, 0, 'a list of patterns such as ["classify", "infer"]'),
    "models": (("*",), 0, 0, 'a list of patterns such as ["efficientnet-*"]'),
    "devices": (("*",), 0, 0, 'a list of patterns such as ["cpu", "cuda:*"]'),
    "require_grant": ((), 0, 0, 'a list of patterns such as ["cuda:*"]'),
    "exec": (False, 0, 0, "true or false"),
    "libraries": (("*",), 0, 0, 'a list of patterns such as ["sha256:1f0c..."]'),
    "concurrent_requests": (None, 1, 1 << 20, "a whole number of at least 1"),
    "queue_length": (None, 1, 1 << 20, "a whole number of at least 1"),
    "requests_per_s": (None, 1e-3, 1e9, "a number above 0"),
    "device_s_per_s": (None, 1e-6, 1e4, "a number above 0"),
    "burst_s": (1.0, 1e-3, 86400, "a number of seconds above 0"),
    "stored_bytes": (None, 1, 1 << 53, "a whole number of bytes"),
    "connections": (None, 1, 1 << 20, "a whole number of at least 1"),
    "sessions": (None, 1, 1 << 20, "a whole number of at least 1"),
    "message_bytes": (None, 4 << 20, 1 << 31, "a whole number of at least 4194304"),
    "weight": (1.0, 0.01, 1000, "a number from 0.01 to 1000"),
    "priority": (0, 0, 10, "a whole number from 0 to 10"),
}
_NUMBERS = ("requests_per_s", "device_s_per_s", "burst_s", "weight")
#: Lists of patterns, and the word for one thing that they allow.
_LISTS = {
    "operations": "operation",
    "models": "model",
    "devices": "device",
    "require_grant": "device",
    "libraries": "library",
}
#: Kinds of devices that shares are of, as Kubernetes counts them: `remora.dev/<kind>`.
KINDS = ("cpu", "gpu")
_MAX_PATTERNS = 256
_MAX_RULES = 4096
_LONG = 1 << 128


@lru_cache(maxsize=4096)
def _allowed(patterns: tuple[str, ...], value: str) -> bool:
    """Return whether a pattern matches. Remembered, because three lists are asked for every request."""
    return any(fnmatchcase(value, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Rule:
    """One table of the file."""

    table: str
    values: Mapping[str, Any]
    match: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Granted:
    """What the kubelet gave to a pod of one kind of device."""

    kind: str
    shares: int
    shares_per_device: int

    @property
    def device_s_per_s(self) -> float:
        return self.shares / self.shares_per_device

    @property
    def rule(self) -> str:
        """How a refusal names it."""
        return f"rule [grant.{self.kind}] device_s_per_s = {self.device_s_per_s:g} in the pod's resources"


def kind_of(device: str) -> str:
    """Return the kind that a device of the agent's (`cpu`, `cuda:0`) counts as."""
    return "cpu" if device == "cpu" else "gpu"


@dataclass(frozen=True, slots=True)
class Terms:
    """What one caller may do. `sources` has the table that set each key; keys without one have their default."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    file: str = ""
    share: Share = EVERYONE
    #: By kind of device.
    grants: Mapping[str, Granted] = field(default_factory=dict)

    def rule(self, key: str) -> str:
        """Return how a refusal names the rule: file, table, key and value."""
        return (
            f"rule {self.sources.get(key, '[defaults]')} {key} = {shown(self.values[key])} in {self.file or 'policy'}"
        )

    def check(self, key: str, value: str) -> None:
        """
        Raises:
            PermissionDeniedError: none of the key's patterns allows `value`.
        """
        if not _allowed(self.values[key], value):
            raise PermissionDeniedError(
                f"{_LISTS[key]} {value[:100]!r} is not allowed ({self.rule(key)})", fix="ask the operator to allow it"
            )

    def check_device(self, device: str) -> None:
        """
        Raises:
            PermissionDeniedError: policy forbids the device, or keeps it for pods with a grant, which this is not.
        """
        self.check("devices", device)
        kind = kind_of(device)
        if kind not in self.grants and self.allows("require_grant", device):
            raise PermissionDeniedError(
                f"device {device} is for pods with a grant ({self.rule('require_grant')})",
                fix=f"ask for remora.dev/{kind} in the resources of the pod's containers",
            )

    def share_on(self, device: str) -> Share:
        """Return how requests that run on a device compete: with a grant as many times as it has shares."""
        granted = self.grants.get(kind_of(device))
        if granted is None:
            return self.share
        return replace(self.share, weight=min(KEYS["weight"][2], self.share.weight * granted.shares))

    def allows(self, key: str, value: str) -> bool:
        return _allowed(self.values[key], value)

    def exhausted(self, key: str, what: str, after_s: float) -> RemoraError:
        """Return the refusal of a caller that is over a bound."""
        return with_retry(ResourceExhaustedError(f"{what} ({self.rule(key)})"), after_s)


#: Nothing is refused: the terms of whoever no table mentions.
UNBOUNDED = Terms({key: entry[0] for key, entry in KEYS.items()}, {})


@dataclass(frozen=True, slots=True)
class Rules:
    defaults: Rule = field(default_factory=lambda: Rule("[defaults]", {}))
    tenants: Mapping[str, Rule] = field(default_factory=dict)
    labels: tuple[Rule, ...] = ()
    #: How refusals name the file.
    file: str = field(default="", compare=False)

    def terms(self, tenant: str, labels: Mapping[str, str]) -> Terms:
        """Put together what applies to a caller.

        A tenant's table is named as the agent names tenants (`uid:1000`, `sandbox:web`), or without `tenant:`.
        """
        values: dict[str, Any] = {key: entry[0] for key, entry in KEYS.items()}
        sources: dict[str, str] = {}
        own = self.tenants.get(tenant) or self.tenants.get(tenant.removeprefix("tenant:"))
        matching = [rule for rule in self.labels if _matches(rule.match, labels)]
        for rule in (self.defaults, *matching, *((own,) if own is not None else ())):
            values.update(rule.values)
            sources.update(dict.fromkeys(rule.values, rule.table))
        terms = Terms(values, sources, self.file)
        share = Share(
            float(values["weight"]),
            values["priority"],
            values["concurrent_requests"] or 0,
            values["queue_length"] or 0,
            terms.rule("queue_length") if values["queue_length"] else "",
        )
        return Terms(values, sources, self.file, share)


def shown(value: Any) -> str:
    """Return a value as TOML has it. One that is nested is only named: its text may be as deep as Python's stack."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    if isinstance(value, Mapping | list):
        return "a table" if isinstance(value, Mapping) else f"a list of {len(value)}"
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, int) and abs(value) >= _LONG:  # beyond some length Python refuses to write it
        return f"a number of {value.bit_length()} bits"
    return "none" if value is None else str(value)


def _matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(key in labels and fnmatchcase(labels[key], pattern) for key, pattern in wanted.items())


# -- reading ----------------------------------------------------------------------------------------------------------


def _value(where: str, key: str, value: object) -> object:
    _default, least, most, wanted = KEYS[key]
    if key in _LISTS:
        if isinstance(value, list) and len(value) <= _MAX_PATTERNS and all(isinstance(one, str) for one in value):
            return tuple(value)
    elif key == "exec":
        if isinstance(value, bool):
            return value
    elif isinstance(value, (int, float) if key in _NUMBERS else int) and not isinstance(value, bool):
        in_range = least <= value <= most
        if in_range:
            return value
    raise InvalidArgumentError(f"{where} {key} = {shown(value)} is not {wanted}", fix="see docs/policy.md")


def _rule(where: str, table: str, values: object, match: Mapping[str, str] | None = None) -> Rule:
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f"{where}: {table} is not a table", fix=f"write {table} and its keys below it")
    read = {}
    for key, value in values.items():
        if key not in KEYS:
            raise InvalidArgumentError(
                f"{where}: {table} has no key `{key[:80]}`", fix=f"the keys are {', '.join(sorted(KEYS))}"
            )
        read[key] = _value(f"{where}: {table}", key, value)
    return Rule(table, read, match or {})


def parse_rules(document: Mapping[str, Any], where: str, file: str) -> Rules:
    """Read `[defaults]`, `[tenant.NAME]` and `[[label]]` of a parsed file.

    Raises:
        InvalidArgumentError: an unknown key, or a value that cannot be; says where and what is allowed.
    """
    tenants, labels = document.get("tenant", {}), document.get("label", [])
    if not isinstance(tenants, Mapping):
        raise InvalidArgumentError(f"{where}: `tenant` is not a table", fix='write [tenant."NAME"]')
    if not isinstance(labels, list) or not all(isinstance(entry, Mapping) for entry in labels):
        raise InvalidArgumentError(f"{where}: `label` is not a list of tables", fix="write [[label]]")
    if len(tenants) + len(labels) > _MAX_RULES:
        raise InvalidArgumentError(f"{where} has more than {_MAX_RULES} rules", fix="match by label")
    read = []
    for number, entry in enumerate(labels, 1):
        table, match = f"[[label]] {number}", entry.get("match")
        if not isinstance(match, Mapping) or not match or not all(isinstance(one, str) for one in match.values()):
            raise InvalidArgumentError(f"{where}: {table} has no match", fix='write match = { tier = "gold*" }')
        read.append(_rule(where, table, {key: entry[key] for key in entry if key != "match"}, match))
    return Rules(
        _rule(where, "[defaults]", document.get("defaults", {})),
        {name: _rule(where, f'[tenant."{name}"]', values) for name, values in tenants.items()},
        tuple(read),
        file,
    )
