"""Who a process runs as: `uid[:gid]` or names, looked up in the image's own /etc/passwd and /etc/group."""

from __future__ import annotations

from remora.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple


class User:
    __slots__ = ("uid", "gid", "groups", "home")

    def __init__(self, uid: int, gid: int, groups: List[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def find(text: str, passwd: str, group: str) -> User:
    """Return the user that `text` names.

    Args:
        text: `user[:group]`, each a number or a name; empty for root.
        passwd: Content of the image's /etc/passwd (passwd(5)).
        group: Content of the image's /etc/group (group(5)).

    Raises:
        InvalidArgumentError: the image has no such user or group.
    """
    user_text, _, group_text = (text or "0").partition(":")
    entries = _rows(passwd, 7)
    uid = _number(user_text)
    entry: Optional[List[str]] = None
    for row in entries:
        if row[0] == user_text or (uid is not None and _number(row[2]) == uid):
            entry = row
            break
    if uid is None and entry is None:
        names = ", ".join(row[0] for row in entries[:20]) or "none"
        raise InvalidArgumentError(
            f"the image has no user {user_text!r}; its /etc/passwd names: {names}", fix="give a number or one of these"
        )
    name, gid, home = "", 0, "/"
    if entry is not None:
        name, home = entry[0], entry[5] or "/"
        uid, gid = _number(entry[2]), _number(entry[3]) or 0
    groups = [gid] if name else []
    groups += [number for number, members in _groups(group) if name in members and number != gid]
    if group_text:
        gid = _group_id(group_text, group)
        groups = [gid]
    return User(uid or 0, gid, groups, home)


def _group_id(text: str, group: str) -> int:
    number = _number(text)
    if number is not None:
        return number
    for row in _rows(group, 4):
        if row[0] == text and (number := _number(row[2])) is not None:
            return number
    raise InvalidArgumentError(f"the image has no group {text!r} in its /etc/group", fix="give the group's number")


def _groups(group: str) -> List[Tuple[int, List[str]]]:
    found = []
    for row in _rows(group, 4):
        number = _number(row[2])
        if number is not None:
            found.append((number, [name for name in row[3].split(",") if name]))
    return found


def _rows(text: str, fields: int) -> List[List[str]]:
    rows = [line.strip().split(":") for line in text.splitlines()]
    return [row for row in rows if len(row) >= fields]


def _number(text: str) -> Optional[int]:
    return int(text) if text.isascii() and text.isdigit() and int(text) < 1 << 32 else None
