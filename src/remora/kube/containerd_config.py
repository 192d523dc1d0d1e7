"""What a node's containerd must know of Remora, added to its configuration and taken out again. Text in, text out.

containerd's TOML is never written anew: comments and order are the operator's. Our tables go behind what is there,
between two marks, and the result is parsed and compared: it must say what it said before, and our runtime. A
configuration that imports a directory (containerd 2) gets a file of our own there and stays as it is. containerd 1.6
imports files as well, but one that speaks of the CRI plugin replaces all that the main file says of it.
"""

from __future__ import annotations

import fnmatch
import posixpath
import tomllib
from collections.abc import Mapping
from typing import Any

from remora.errors import FailedPreconditionError

RUNTIME = "remora"
TYPE = "io.containerd.remora.v2"
#: The CRI plugin that reads runtimes, by version of the configuration. Version 3 is containerd 2; all read version 2.
_PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
DROP_IN = "remora.toml"
_BEGIN, _END = "# remora node install: begin", "# remora node install: end"

Toml = Mapping[str, Any]


def new_file() -> str:
    """Return a main file for a node that has none: containerd's defaults, in the version that each containerd reads."""
    return "version = 2\n"


def tables(version: int, settings: str) -> dict[str, Any]:
    """Return what a configuration of that version must hold; `settings` is the path of the shim's own file."""
    runtime = {
        "runtime_type": TYPE,
        "pod_annotations": ["io.remora.*"],
        # A container's annotations are the kubelet's, device plugins' among them; a pod's author sets none of them.
        "container_annotations": ["io.remora.*", "grant.remora.dev/*"],
        "privileged_without_host_devices": True,
        "options": {"TypeUrl": "remora/config", "ConfigPath": settings},
    }
    return {"plugins": {_PLUGINS[version]: {"containerd": {"runtimes": {RUNTIME: runtime}}}}}


def drop_in_for(text: str, config: str) -> str | None:
    """Return the path of the file that this configuration would import, None if there is no such directory.

    Args:
        text: of the main file.
        config: its path on the node: containerd takes patterns relative to it.

    Raises:
        FailedPreconditionError: it is not understood.
    """
    parsed, version = _understand(text, config)
    if version < 3:
        return None
    for pattern in parsed.get("imports", ()):
        directory, name = posixpath.split(posixpath.join(posixpath.dirname(config), pattern))
        if fnmatch.fnmatchcase(DROP_IN, name) and "*" not in directory:
            return posixpath.join(directory, DROP_IN)
    return None


def drop_in(text: str, config: str, settings: str) -> str:
    """Return the file for an imported directory, after a look that nothing else defines the runtime."""
    parsed, version = _understand(text, config)
    _refuse_foreign(parsed, version, config)
    return f"version = {version}\n{_written(version, settings)}"


def add(text: str, config: str, settings: str) -> str:
    """Return the main file with the runtime in it; a block of an earlier installation is replaced.

    Raises:
        FailedPreconditionError: it is not understood, or defines the runtime itself; `fix` says what to do.
    """
    bare = remove(text)
    parsed, version = _understand(bare, config)
    _refuse_foreign(parsed, version, config)
    added = f"{bare}\n{_BEGIN}\n{_written(version, settings)}{_END}\n"
    try:
        result = tomllib.loads(added)
    except tomllib.TOMLDecodeError as error:
        raise _not_understood(config, f"it takes no table behind it: {error}") from error
    if result != _merged(parsed, tables(version, settings)):
        raise _not_understood(config, "a table behind it would change what it says")
    return added


def remove(text: str) -> str:
    """Return the main file without our block: byte for byte what `add` was given."""
    begin = text.find(f"\n{_BEGIN}\n")
    if begin < 0:
        return text
    end = text.find(f"{_END}\n", begin)
    if end < 0:
        raise FailedPreconditionError(
            f"the mark {_END!r} is gone from containerd's configuration", fix=f"remove what stands behind {_BEGIN!r}"
        )
    return text[:begin] + text[end + len(_END) + 1 :]


def holds_block(text: str) -> bool:
    return f"\n{_BEGIN}\n" in text


def _understand(text: str, config: str) -> tuple[Toml, int]:
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_understood(config, f"it is no TOML: {error}") from error
    version = parsed.get("version", 1)
    if version not in _PLUGINS:
        raise _not_understood(
            config, f"it is of version {version}", "containerd config migrate writes it as one of 2 or 3"
        )
    disabled = parsed.get("disabled_plugins", ())
    if any(name in disabled for name in ("cri", *_PLUGINS.values())):
        raise FailedPreconditionError(
            f"{config} disables the CRI plugin, so no kubelet can use this containerd",
            fix="take it out of disabled_plugins",
        )
    return parsed, version


def _refuse_foreign(parsed: Toml, version: int, config: str) -> None:
    runtimes = parsed.get("plugins", {})
    for key in (_PLUGINS[version], "containerd", "runtimes"):
        runtimes = runtimes.get(key, {})
    if RUNTIME in runtimes:
        raise FailedPreconditionError(
            f"{config} has a runtime {RUNTIME!r} that `remora node install` did not write",
            fix="remove that table, then install again",
        )


def _not_understood(config: str, why: str, fix: str = "") -> FailedPreconditionError:
    return FailedPreconditionError(
        f"containerd's configuration {config} is not understood: {why}",
        fix=fix or "add the runtime by hand as docs/kubernetes.md says, and install with --no-containerd",
    )


def _written(version: int, settings: str) -> str:
    """Return the tables as TOML."""
    wanted = tables(version, settings)
    runtime = wanted["plugins"][_PLUGINS[version]]["containerd"]["runtimes"][RUNTIME]
    path = f'plugins."{_PLUGINS[version]}".containerd.runtimes.{RUNTIME}'
    lines = [f"[{path}]"]
    lines += [f"  {key} = {_value(value)}" for key, value in runtime.items() if key != "options"]
    lines += [f"  [{path}.options]"]
    lines += [f"    {key} = {_value(value)}" for key, value in runtime["options"].items()]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _merged(below: Toml, above: Toml) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
