"""Grants: which shares of the node's accelerators the kubelet gave to which pod (docs/decisions, on grants).

The device plugin states a grant before the kubelet has its answer, under an id of its own making that nobody can guess.
The shim presents the id, which reached it through containerd, when it attaches the pod; from then on it is that pod's
alone. So it does not matter what else a pod's author manages to write where the shim looks: an id that was never
stated, or is another pod's, grants nothing.

Nobody says when a grant has ended. The kubelet gives a share away again when its pod is gone, so a pod that presents a
grant takes its shares from whoever held them. Containers of one pod may hold the same shares one after another (the
kubelet lends those of init containers on): a pod has the union.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from remora.agent.journal import Done, Journal
from remora.agent.rules import KINDS, Granted
from remora.errors import AlreadyExistsError, InvalidArgumentError

_ID = re.compile(r"[0-9a-f]{32}")
_SHARE = re.compile(r"[a-z0-9-]{1,63}")
#: Shares of one grant, and of one device: more than a node has.
_MOST_SHARES = 10000
#: Grants that are remembered: many times what a node has pods.
MAX_GRANTS = 4096
#: Ids that one sandbox may present at once.
MAX_PRESENTED = 256


@dataclass(slots=True)
class Grant:
    """Some shares of one kind of device. `holder` is the pod that presented it; empty: none yet."""

    id: str
    kind: str
    shares: frozenset[str]
    shares_per_device: int
    #: Later ones are larger.
    serial: int = 0
    holder: str = field(default="")


def check(grant_id: str, kind: str, shares: Iterable[str], shares_per_device: int) -> Grant:
    """Return a grant that may be stated.

    Raises:
        InvalidArgumentError: it is none; says what is wrong.
    """
    given = list(shares)
    if not _ID.fullmatch(grant_id):
        raise InvalidArgumentError("the grant's id is not 32 hexadecimal digits", fix="make 16 random bytes")
    if kind not in KINDS:
        raise InvalidArgumentError(f"{kind[:40]!r} is no kind of device", fix=f"the kinds are {', '.join(KINDS)}")
    if not 1 <= shares_per_device <= _MOST_SHARES or not 1 <= len(given) <= _MOST_SHARES:
        raise InvalidArgumentError(
            f"{len(given)} shares of {shares_per_device} per device are no grant", fix=f"1 to {_MOST_SHARES} of each"
        )
    if len(set(given)) != len(given) or not all(_SHARE.fullmatch(one) for one in given):
        raise InvalidArgumentError("the grant's shares are no names, or come twice", fix="name each share once")
    return Grant(grant_id, kind, frozenset(given), shares_per_device)


class Grants:
    """All grants of this node. What is stated survives the agent before it is acknowledged."""

    def __init__(self, journal: Journal, on_change: Callable[[], None]) -> None:
        """
        Args:
            on_change: Called when a holder has more or less than before.
        """
        self._journal = journal
        self._on_change = on_change
        self._by_id: dict[str, Grant] = {}
        self._of: dict[str, Mapping[str, Granted]] = {}
        rows = journal.rows("SELECT id, kind, shares, per_device, serial, holder FROM grants ORDER BY serial")
        for grant_id, kind, shares, per_device, serial, holder in rows:
            self._by_id[grant_id] = Grant(grant_id, kind, frozenset(json.loads(shares)), per_device, serial, holder)
        self._serial = max((grant.serial for grant in self._by_id.values()), default=0)
        for holder in {grant.holder for grant in self._by_id.values()}:
            self._sum(holder)

    def __len__(self) -> int:
        return len(self._by_id)

    def of(self, holder: str) -> Mapping[str, Granted]:
        """Return what a holder has, by kind."""
        return self._of.get(holder, {})

    def state(self, grant: Grant, done: Done) -> None:
        """Take a grant into the books; `done` is called once a crash cannot lose it.

        Raises:
            AlreadyExistsError: its id is taken.
        """
        if grant.id in self._by_id:
            raise AlreadyExistsError("there is a grant of this id", fix="make 16 random bytes")
        if len(self._by_id) >= MAX_GRANTS:
            # Those that nobody has presented are of pods that never started.
            oldest = min(self._by_id.values(), key=lambda one: (bool(one.holder), one.serial))
            self._drop([oldest])
        self._serial += 1
        grant.serial = self._serial
        self._by_id[grant.id] = grant
        self._journal.write(
            (
                "INSERT OR REPLACE INTO grants VALUES (?,?,?,?,?,?)",
                (grant.id, grant.kind, json.dumps(sorted(grant.shares)), grant.shares_per_device, grant.serial, ""),
            ),
            durable=True,
            done=done,
        )

    def present(self, holder: str, ids: Iterable[str]) -> list[str]:
        """Give a pod what it presents; return why, for each id that it does not get."""
        refused = []
        for grant_id in ids:
            grant = self._by_id.get(grant_id)
            if grant is None:
                refused.append("no such grant was stated to this agent")
            elif grant.holder == holder:
                continue
            elif grant.holder:
                refused.append(f"it is the grant of another pod, {grant.holder}")
            else:
                self._take(grant, holder)
        return refused

    def _take(self, grant: Grant, holder: str) -> None:
        grant.holder = holder
        self._journal.write(("UPDATE grants SET holder=? WHERE id=?", (holder, grant.id)))
        over = [
            other
            for other in self._by_id.values()
            if other.kind == grant.kind
            and other.holder != holder
            and (other.holder or other.serial < grant.serial)
            and other.shares & grant.shares
        ]
        self._drop(over)
        self._sum(holder)
        self._on_change()

    def _drop(self, grants: list[Grant]) -> None:
        for grant in grants:
            del self._by_id[grant.id]
            self._journal.write(("DELETE FROM grants WHERE id=?", (grant.id,)))
        for holder in {grant.holder for grant in grants if grant.holder}:
            self._sum(holder)
            self._on_change()

    def _sum(self, holder: str) -> None:
        """Add up what a holder has: the union of its grants' shares."""
        if not holder:
            return
        shares: dict[str, set[str]] = {}
        per_device: dict[str, int] = {}
        for grant in self._by_id.values():
            if grant.holder == holder:
                shares.setdefault(grant.kind, set()).update(grant.shares)
                per_device[grant.kind] = grant.shares_per_device  # of the latest: the operator may have changed it
        if shares:
            self._of[holder] = {kind: Granted(kind, len(names), per_device[kind]) for kind, names in shares.items()}
        else:
            self._of.pop(holder, None)
