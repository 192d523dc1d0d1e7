"""A sandbox's jail: read from `--jail`, claimed when the sandbox is made, written into its record, cleared by that.

The record is what brings a jail to its end after every process that knew of it was killed, so it holds all of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remora import paths
from remora.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError
from remora.vmm import jail as jails
from remora.vmm.process import find_program

_CGROUP = re.compile(r"[a-z_]+\.[a-z0-9_.]+=[^=]+")
_USERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_MOST_UID = (1 << 32) - 2
_KEYS = "uid=, gid=, base=, netns=, cgroup= and parent-cgroup="


class JailRequest(NamedTuple):
    """What was asked for. Of several users each microVM gets one that no other has."""

    first_uid: int
    last_uid: int
    #: None: as the user's number.
    gid: int | None = None
    #: None: below the state directory, on whose file system the images are.
    base: Path | None = None
    netns: Path | None = None
    cgroups: tuple[str, ...] = ()
    parent_cgroup: str = jails.PARENT_CGROUP


def parse(texts: Sequence[str]) -> JailRequest:
    """Read `uid=UID` or `uid=FIRST-LAST`, `gid=GID`, `base=DIRECTORY`, `netns=FILE`, `cgroup=FILE=VALUE` and
    `parent-cgroup=NAME`.

    Raises:
        InvalidArgumentError: a part that is none of these, or no user.
    """
    fields: dict[str, str] = {}
    cgroups = []
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not value or key not in ("uid", "gid", "base", "netns", "cgroup", "parent-cgroup"):
            raise InvalidArgumentError(f"'{text[:80]}' is no part of a jail", fix=f"use {_KEYS}")
        if key == "cgroup":
            if not _CGROUP.fullmatch(value):
                raise InvalidArgumentError(
                    f"'{value[:80]}' is no setting of a cgroup", fix="write cgroup=FILE=VALUE: cgroup=pids.max=64"
                )
            cgroups.append(value)
        elif key in fields:
            raise InvalidArgumentError(
                f"{key}= was given twice", fix="give it once; a range of users is uid=FIRST-LAST"
            )
        else:
            fields[key] = value
    first, last = _users(fields.get("uid", ""))
    gid = fields.get("gid")
    if gid is not None and not (gid.isascii() and gid.isdigit() and 0 < int(gid) <= _MOST_UID):
        raise InvalidArgumentError(f"gid={gid} is no unprivileged group", fix="give the number of one, as gid=30000")
    parent = fields.get("parent-cgroup", jails.PARENT_CGROUP)
    if parent.startswith("/") or {"", ".", ".."} & set(parent.split("/")):
        raise InvalidArgumentError(f"parent-cgroup={parent} is no relative path", fix="write it like parent-cgroup=vms")
    netns = Path(fields["netns"]) if "netns" in fields else None
    if netns is not None and not netns.exists():
        raise InvalidArgumentError(
            f"there is no network namespace {netns}", fix="make it: ip netns add NAME; then netns=/var/run/netns/NAME"
        )
    base = Path(fields["base"]).absolute() if "base" in fields else None
    return JailRequest(first, last, None if gid is None else int(gid), base, netns, tuple(cgroups), parent)


def _users(text: str) -> tuple[int, int]:
    if not text:
        raise InvalidArgumentError(
            "a jail needs a user that owns nothing else",
            fix="name one, or a range of which each microVM gets its own: --jail uid=30000-30999",
        )
    match = _USERS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < first <= last <= _MOST_UID:
        raise InvalidArgumentError(
            f"uid={text} names no unprivileged user", fix="write uid=30000, or uid=30000-30999 for one each"
        )
    return first, last


def check(vmm: str) -> None:
    """Refuse where no jail can be made, before anything is.

    Raises:
        InvalidArgumentError: another monitor than Firecracker.
        PermissionDeniedError: not root.
        FailedPreconditionError: no jailer.
    """
    if vmm != "firecracker":
        raise InvalidArgumentError(
            f"only Firecracker has a jailer, and the monitor is {vmm}", fix="add --vmm firecracker, or leave --jail out"
        )
    if os.geteuid() != 0:
        raise PermissionDeniedError("the jailer needs root", fix="run it as root, or leave --jail out")
    if find_program("jailer") is None:
        raise FailedPreconditionError(
            "Firecracker's jailer is not installed",
            fix="put the jailer of the same release on PATH, beside firecracker",
        )


def claim(request: JailRequest, others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the jail in a new sandbox's record; `others` are the records that exist, none of them made meanwhile.

    Raises:
        ResourceExhaustedError: every user of the range has a microVM.
    """
    users = {other["jail"]["uid"] for other in others if "jail" in other and other.get("state") != "exited"}
    alone = request.first_uid != request.last_uid
    uid = next((u for u in range(request.first_uid, request.last_uid + 1) if not alone or u not in users), None)
    if uid is None:
        raise ResourceExhaustedError(
            f"each user from {request.first_uid} to {request.last_uid} has a microVM",
            fix="widen the range: --jail uid=",
        )
    binary = find_program("firecracker")
    if binary is None:
        raise FailedPreconditionError("firecracker is not installed", fix="put a release of Firecracker on PATH")
    return {
        "base": str(Path(os.path.realpath(request.base or paths.state_dir() / "jail"))),
        # As the jailer itself resolves it.
        "binary": os.path.realpath(binary),
        "uid": uid,
        "gid": uid if request.gid is None else request.gid,
        "cgroup_version": 2 if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else 1,
        # Without settings the jailer makes no cgroup, and version 2 would have it look for the parent.
        "parent_cgroup": request.parent_cgroup if request.cgroups else "",
        "cgroups": list(request.cgroups),
        "netns": None if request.netns is None else str(request.netns),
    }


def jail_of(fields: dict[str, Any]) -> jails.Jail | None:
    """Return the jail of a sandbox by its record; None if it has none."""
    if "jail" not in fields:
        return None
    kept = fields["jail"]
    return jails.Jail(
        **{
            **kept,
            "id": str(fields["id"]),
            "base": Path(kept["base"]),
            "binary": Path(kept["binary"]),
            "cgroups": tuple(kept["cgroups"]),
            "netns": Path(kept["netns"]) if kept["netns"] else None,
        }
    )
