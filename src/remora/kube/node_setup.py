"""Makes a node one that runs Remora's pods, and takes that back.

What a node gets: the shim on containerd's PATH, its settings, the runtime in containerd's configuration, and the
agent's systemd units where the agent is not a pod. Everything is compared first and written only where it differs, so
that a second run changes nothing and restarts nothing.
"""

from __future__ import annotations

import os
import posixpath
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from remora.errors import FailedPreconditionError, NotFoundError
from remora.kube import containerd_config, node_bundle
from remora.kube.node_bundle import Bundle
from remora.kube.node_files import RECORD, Change, File, Node, Record
from remora.shim import launcher

SETTINGS = "/etc/remora/runtime.toml"
AGENT_CONFIG = "/etc/remora/agent.toml"
UNITS = "/etc/systemd/system"
UNIT_NAMES = ("remora-agent.service", "remora-agent.socket")
CONTAINERD_CONFIG = "/etc/containerd/config.toml"
#: Where distributions and containerd's own archives put it.
_BINARIES = ("/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin", "/bin", "/opt/containerd/bin")
_SHIMS = "/run/remora/shim"
_K3S = ("/var/lib/rancher/k3s", "/var/lib/rancher/rke2")


@dataclass(frozen=True)
class Setup:
    """What to install."""

    config: str = CONTAINERD_CONFIG
    #: A directory on containerd's PATH.
    bin_dir: str = "/usr/local/bin"
    #: The shim's own environment, where the node has none: that of the image that this process runs in.
    bundle: Bundle | None = None
    #: The interpreter of agent and shim, and where Remora's sources lie, both as the node sees them.
    python: str = sys.executable
    source: str = str(Path(__file__).resolve().parents[2])
    containerd: bool = True
    #: The agent as a systemd service; False where it is a DaemonSet.
    agent: bool = True


def install(node: Node, setup: Setup, *, restart: Callable[[], str]) -> None:
    """Bring the node to where `setup` wants it; what was done is in `node.changes`.

    Args:
        restart: Has containerd read its configuration again; returns "" or why that is left to the operator.

    Raises:
        FailedPreconditionError: there is no containerd, or its configuration is not understood; nothing was changed.
    """
    record = node.load() or Record()
    wanted = _wanted(setup)
    if setup.bundle is not None:
        record.trees += [tree for tree in node_bundle.trees(setup.bundle) if tree not in record.trees]
    config = _containerd_files(node, setup, record) if setup.containerd else []
    backup = [File(record.backup, _backup_of(node, setup))] if record.backup and config else []
    node.keep_record(record, [*wanted, *(file for file in config if file.path != setup.config)])
    if setup.bundle is not None:
        node_bundle.install(node, setup.bundle)
    for file in (*wanted, *backup):
        node.write(file)
    written = [node.write(file) for file in config]
    if any(written) or record.restart_due:
        # Written down first: a restart that fails is made up for by the next run.
        record.restart_due = True
        node.save(record)
        _restarted(node, restart)
        record.restart_due = False
        node.save(record)


def uninstall(
    node: Node, *, restart: Callable[[], str], stop_agent: Callable[[], None] = lambda: None, force: bool = False
) -> None:
    """Take back what `install` did: containerd's configuration as it was, and no file of ours.

    Args:
        restart: As for `install`.
        stop_agent: Ends the agent's units before their files go.

    Raises:
        FailedPreconditionError: pods of the runtime are running, and `force` is not set.
        NotFoundError: there is no record of an installation.
    """
    record = node.load()
    if record is None:
        raise NotFoundError(
            f"Remora is not installed on this node: {node.at(RECORD)} does not exist",
            fix="name the node's root with --root",
        )
    running = _running_pods(node)
    if running and not force:
        raise FailedPreconditionError(
            f"{running} pods of the runtime are running on this node",
            fix="drain it first (kubectl drain), or use --force: their containers can then only be killed",
        )
    if f"{UNITS}/{UNIT_NAMES[0]}" in record.files:
        stop_agent()
    changed = _restore_config(node, record)
    drop_in = _drop_in_of(node, record)
    for path, digest in record.files.items():
        changed |= node.remove(path, digest) and path == drop_in
    for tree in record.trees:
        node.remove_tree(tree)
    if record.backup:
        node.remove(record.backup)
    if changed or record.restart_due:
        record.restart_due = True
        node.save(record)
        _restarted(node, restart)
    node.remove(RECORD)
    node.remove_directories(record.directories)


def _wanted(setup: Setup) -> list[File]:
    settings = files("remora.kube").joinpath("runtime.toml").read_bytes()
    wanted = [File(SETTINGS, settings, theirs=True)]
    if setup.containerd:
        shim = posixpath.join(setup.bin_dir, launcher.NAME)
        bundle = setup.bundle
        program = launcher.program(setup.python, setup.source) if bundle is None else node_bundle.shim(bundle)
        wanted.append(File(shim, program.encode(), 0o755))
        if bundle is not None:
            wanted.append(node_bundle.guest_note(bundle))
    if setup.agent:
        wanted.append(
            File(AGENT_CONFIG, b"# Limits and rules; every key and its default: docs/agent.md\n", theirs=True)
        )
        for name in UNIT_NAMES:
            text = files("remora.kube").joinpath("units", name).read_text()
            command = f"ExecStart={setup.python} -m remora agent"
            wanted.append(
                File(f"{UNITS}/{name}", text.replace("ExecStart=/usr/bin/env remora agent", command).encode())
            )
    return wanted


def _containerd_files(node: Node, setup: Setup, record: Record) -> list[File]:
    """Return what containerd's configuration becomes; the record learns how it was."""
    found = node.read(setup.config)
    if found is None and not _has_containerd(node):
        k3s = next((path for path in _K3S if node.at(path).exists()), "")
        raise FailedPreconditionError(
            f"there is no containerd on this node: no {node.at(setup.config)}, no binary in {', '.join(_BINARIES)}",
            fix=f"k3s has one of its own: --config {k3s}/agent/etc/containerd/config.toml"
            if k3s
            else "install containerd 1.6 or newer (apt-get install containerd), or name its file with --config",
        )
    if record.config and record.config != setup.config:
        raise FailedPreconditionError(
            f"Remora is installed in {record.config}, not in {setup.config}",
            fix="run remora node uninstall first, or give --config as the first time",
        )
    record.config = setup.config
    text = (found or b"").decode()
    if found is None or (record.created_config and containerd_config.remove(text) == containerd_config.new_file()):
        record.created_config = True
        text = containerd_config.new_file()
    bare = containerd_config.remove(text)
    drop_in = containerd_config.drop_in_for(bare, setup.config)
    if drop_in is not None:
        written = [File(drop_in, containerd_config.drop_in(bare, setup.config, SETTINGS).encode())]
        if containerd_config.holds_block(text):  # of a time when nothing was imported
            written.append(File(setup.config, bare.encode(), node.mode(setup.config)))
        return written
    if not record.created_config:
        record.backup = f"{setup.config}.before-remora"
    return [File(setup.config, containerd_config.add(text, setup.config, SETTINGS).encode(), node.mode(setup.config))]


def _backup_of(node: Node, setup: Setup) -> bytes:
    """Return the configuration as it was before us: of today, if the operator has changed it since."""
    return containerd_config.remove((node.read(setup.config) or b"").decode()).encode()


def _restore_config(node: Node, record: Record) -> bool:
    found = node.read(record.config) if record.config else None
    if found is None:
        return False
    text = found.decode()
    bare = containerd_config.remove(text)
    if record.created_config and bare == containerd_config.new_file():
        return node.remove(record.config)
    if bare == text:
        return False
    return node.write(File(record.config, bare.encode(), node.mode(record.config)))


def _drop_in_of(node: Node, record: Record) -> str | None:
    text = (node.read(record.config) or b"").decode() if record.config else ""
    return containerd_config.drop_in_for(text, record.config) if text else None


def _restarted(node: Node, restart: Callable[[], str]) -> None:
    why = "" if node.dry_run else restart()
    node.changes.append(
        Change("restart-needed" if why else "restart", "containerd", why or "its configuration changed")
    )


def _has_containerd(node: Node) -> bool:
    return any(node.at(f"{directory}/containerd").exists() for directory in _BINARIES)


def _running_pods(node: Node) -> int:
    """Count the shims that answer on the node."""
    count = 0
    try:
        # Through its descriptor: below a mounted root the path of a socket may exceed the 107 bytes of unix(7).
        directory = os.open(node.at(_SHIMS), os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return 0
    try:
        for name in os.listdir(f"/proc/self/fd/{directory}"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(f"/proc/self/fd/{directory}/{name}")
                except OSError:
                    continue  # left by one that was killed
                count += 1
    finally:
        os.close(directory)
    return count
