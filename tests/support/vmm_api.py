"""The API descriptions of Firecracker and Cloud Hypervisor as validators: is this a request that the monitor takes?

Firecracker refuses fields that it does not know (serde's deny_unknown_fields) and Cloud Hypervisor ignores them; both
are held to the strict rule: a field that the description lacks is a mistake of ours.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import yaml

from remora.vmm.firecracker_api import Version

DATA = Path(__file__).parent.parent / "data" / "vmm"
CURRENT = Version(1, 17)
OLDEST = Version(0, 23, 1)
#: What each release of Firecracker brought, by definition and field (its CHANGELOG).
_FIELDS_SINCE = {
    ("MachineConfiguration", "smt"): (1, 0, 0),
    ("MachineConfiguration", "huge_pages"): (1, 7, 0),
    ("NetworkInterface", "mtu"): (1, 16, 0),
    ("Drive", "socket"): (1, 6, 0),
    ("Drive", "io_engine"): (1, 0, 0),
    ("Balloon", "free_page_reporting"): (1, 14, 0),
    ("Balloon", "free_page_hinting"): (1, 14, 0),
    ("SnapshotLoadParams", "resume_vm"): (0, 24, 0),
    ("SnapshotLoadParams", "mem_backend"): (1, 1, 0),
    ("SnapshotLoadParams", "track_dirty_pages"): (1, 13, 0),
    ("SnapshotLoadParams", "network_overrides"): (1, 12, 0),
    ("SnapshotLoadParams", "vsock_override"): (1, 16, 0),
    ("SnapshotLoadParams", "clock_realtime"): (1, 15, 0),
    ("SnapshotLoadParams", "huge_pages"): (1, 17, 0),
    ("Logger", "module"): (1, 5, 0),
}
_PATHS_SINCE = {
    "/balloon": (0, 24, 0),
    "/vm/config": (0, 25, 0),
    "/version": (1, 0, 0),
    "/cpu-config": (1, 4, 0),
    "/entropy": (1, 4, 0),
    "/pmem": (1, 14, 0),
    "/serial": (1, 14, 0),
    "/hotplug": (1, 14, 0),
}
#: Fields that a later release renamed or dropped: definition, field, its schema, required, gone since.
_FIELDS_UNTIL: tuple[tuple[str, str, dict[str, Any], bool, tuple[int, int, int]], ...] = (
    ("MachineConfiguration", "ht_enabled", {"type": "boolean"}, True, (1, 0, 0)),
    ("Vsock", "vsock_id", {"type": "string"}, True, (1, 0, 0)),
    ("NetworkInterface", "allow_mmds_requests", {"type": "boolean"}, False, (1, 0, 0)),
    ("SnapshotCreateParams", "version", {"type": "string"}, False, (1, 5, 0)),
)
#: Fields that were required once: definition, field, until.
_REQUIRED_UNTIL = (
    ("Drive", "path_on_host", (1, 6, 0)),
    ("Drive", "is_read_only", (1, 6, 0)),
    ("SnapshotLoadParams", "mem_file_path", (1, 1, 0)),
)


class Refused(NamedTuple):
    """Why a request is none of this API, in the monitor's own form of an error."""

    status: int
    message: str


class ApiDescription:
    """One version of one monitor's API."""

    def __init__(self, paths: dict[str, Any], definitions: dict[str, Any], *, prefix: str) -> None:
        self._definitions = definitions
        self._validators: dict[str, Any] = {}
        self._prefix = prefix
        self._paths = [(re.compile(re.sub(r"\{[^}]*\}", "([^/]+)", path)), item) for path, item in paths.items()]

    def check(self, method: str, path: str, body: Any) -> Refused | None:
        """Return why the monitor would refuse the request; None if it takes it."""
        if not path.startswith(self._prefix):
            return Refused(404, f"no such path: {path}")
        for pattern, item in self._paths:
            if pattern.fullmatch(path[len(self._prefix) :]):
                operation = item.get(method.lower())
                if operation is None:
                    return Refused(400, f"{path} knows no {method}")
                return self._check_body(operation, body)
        return Refused(404, f"no such path: {path}")

    def _check_body(self, operation: dict[str, Any], body: Any) -> Refused | None:
        schema = _body_schema(operation)
        if schema is None:
            return None if body is None else Refused(400, "this call takes no body")
        if body is None:
            return Refused(400, "this call needs a body")
        key = str(schema)
        if key not in self._validators:
            root = {**schema, "definitions": self._definitions, "components": {"schemas": self._definitions}}
            self._validators[key] = jsonschema_rs.validator_for(root)
        errors = [
            f"{'/'.join(map(str, error.instance_path))}: {error.message}"
            for error in self._validators[key].iter_errors(body)
        ]
        return Refused(400, "; ".join(errors)) if errors else None


def _body_schema(operation: dict[str, Any]) -> dict[str, Any] | None:
    for parameter in operation.get("parameters", ()):
        if parameter.get("in") == "body":
            schema: dict[str, Any] = parameter["schema"]
            return schema
    content = operation.get("requestBody", {}).get("content", {})
    found: dict[str, Any] | None = content.get("application/json", {}).get("schema")
    return found


def _closed(definitions: dict[str, Any]) -> dict[str, Any]:
    for part in _objects(definitions):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
        # jsonschema knows formats of JSON Schema only.
        part.pop("format", None)
        part.pop("discriminator", None)
    return definitions


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


@functools.cache
def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((DATA / name).read_text(), Loader=yaml.CSafeLoader)
    return loaded


@functools.cache
def firecracker(version: Version) -> ApiDescription:
    """Return the API of a release: the current description, less what came later, plus what was dropped since."""
    description = copy.deepcopy(_load("firecracker-api.yaml"))
    definitions: dict[str, Any] = description["definitions"]
    # YAML 1.1 reads the level `Off` as a boolean.
    definitions["Logger"]["properties"]["level"]["enum"] = ["Error", "Warning", "Info", "Debug", "Trace", "Off"]
    for (name, field), since in _FIELDS_SINCE.items():
        if version < since:
            definitions[name]["properties"].pop(field, None)
    for name, field, schema, required, until in _FIELDS_UNTIL:
        if version < until:
            definitions[name]["properties"][field] = schema
            if required:
                definitions[name].setdefault("required", []).append(field)
        elif field not in ("vsock_id",):  # still taken, and ignored
            definitions[name]["properties"].pop(field, None)
    for name, field, until in _REQUIRED_UNTIL:
        if version < until:
            definitions[name].setdefault("required", []).append(field)
    if version < (0, 24, 0):
        definitions["SnapshotCreateParams"]["properties"]["snapshot_type"]["enum"] = ["Full"]
    paths = {
        path: item
        for path, item in description["paths"].items()
        if version >= next((since for prefix, since in _PATHS_SINCE.items() if path.startswith(prefix)), OLDEST)
    }
    return ApiDescription(paths, _closed(definitions), prefix="")


@functools.cache
def cloud_hypervisor() -> ApiDescription:
    description = copy.deepcopy(_load("cloud-hypervisor-api.yaml"))
    return ApiDescription(description["paths"], _closed(description["components"]["schemas"]), prefix="/api/v1")
