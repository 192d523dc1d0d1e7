"""Who is at the other end of a socket. The answer comes from the socket alone, never from what its peer says.

Kinds: a sandbox (its socket or its vsock CID was attached through the control socket), a process of this host (its pod
or its user, from the kernel's peer credentials), the holder of a certificate, and whoever reaches a loopback TCP port.
Each has a prefix of its own, so that no name of one kind can be taken for another's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remora.errors import InvalidArgumentError, PermissionDeniedError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Identity:
    """One caller. `key` names it; sessions belong to a key, resources and quotas to a tenant."""

    key: str
    tenant: str
    sandbox: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The template this sandbox was cloned from.
    parent: str = ""
    template: bool = False
    #: Comes from another machine, whatever socket leads to it here.
    remote: bool = False


def check_name(what: str, name: str) -> str:
    """Return `name` if it is fit to be a sandbox or tenant."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{what} {name[:140]!r} is not a valid name",
            fix="use up to 128 letters, digits, '_', '.' and '-', starting with a letter or digit",
        )
    return name


def of_sandbox(sandbox: str, tenant: str, labels: Mapping[str, str], parent: str, template: bool) -> Identity:
    """Return the identity that `Attach` states. A sandbox without a tenant is a tenant of its own.

    The key and the tenant of a sandbox have a prefix of their own, so that no name can be mistaken for a host user's.
    """
    check_name("sandbox", sandbox)
    owner = f"tenant:{check_name('tenant', tenant)}" if tenant else f"sandbox:{sandbox}"
    if parent:
        check_name("parent", parent)
    return Identity(f"sandbox:{sandbox}", owner, sandbox, dict(labels), parent, template)


def of_user(uid: int) -> Identity:
    """Return the identity of the host's processes of a user."""
    name = f"uid:{uid}"
    return Identity(name, name)


def holder_of(key: str, labels: Mapping[str, str]) -> str:
    """Return whose grants an identity has: its pod's, which may have another sandbox after this one."""
    return labels.get("uid") or key


TCP = Identity("tcp", "tcp")


def check_private_directory(path: Path) -> tuple[int, int]:
    """Return (device, inode) of a directory in which a socket may be made for a guest.

    Raises:
        InvalidArgumentError: not an absolute path of a directory, or a symlink (whoever can replace it could redirect
            the socket), or too long for a socket.
        PermissionDeniedError: it belongs to a user who is neither the agent's nor root, or others may write to it.
    """
    if not path.is_absolute() or path != Path(os.path.normpath(path)):
        raise InvalidArgumentError(f"the directory {path} is not a plain absolute path", fix="give its real path")
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise InvalidArgumentError(f"the directory {path} does not exist", fix="create it first") from error
    except OSError as error:
        raise InvalidArgumentError(f"the directory {path} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symlink" if stat.S_ISLNK(found.st_mode) else "not a directory"
        raise InvalidArgumentError(f"{path} is {kind}", fix="give the sandbox's own directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionDeniedError(
            f"{path} belongs to uid {found.st_uid}, the agent runs as uid {os.geteuid()}",
            fix="let the agent's user own it",
        )
    if found.st_mode & stat.S_IWOTH:
        raise PermissionDeniedError(f"everyone may write to {path}", fix=f"chmod o-w {path}")
    return found.st_dev, found.st_ino
