"""Finds others' microVMs as they come and go, and has them served while they are there.

A thread looks, because the file system may be slow and a shim may not answer; what it saw goes to the reactor, which
compares it with what is served. No inotify: it would take a watch for each of a dozen directories that may not exist
yet, and what overflows its queue is lost. A look at 300 sandboxes takes 10 ms of a processor, at 1000 it takes 50.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.agent.attachments import Attachment, Attachments
from remora.agent.fleets.bundles import Bundles, Names
from remora.agent.fleets.layouts import Fleet, Place
from remora.agent.identity import Identity, of_sandbox
from remora.agent.logs import Log
from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.wire.ports import PORT

PERIOD_S = 0.5
#: Of a processor, at most.
_SHARE = 0.1
MOST_SANDBOXES = 4096
#: Of each: its directory, its monitor, and the agent's two sockets there.
DESCRIPTORS = 4
#: A sandbox that containerd does not know by then is told of.
_UNKNOWN_S = 5.0


@dataclass(frozen=True)
class Sighting:
    """A sandbox as it was seen. Another directory of the same name is another sandbox's."""

    place: Place
    names: Names
    #: Device and inode of the directory.
    inode: tuple[int, int]
    #: Whose the monitor's socket is, or the directory before there is one.
    owner: int
    #: The agent's own socket is there.
    listening: bool
    #: Ids of the grants that its containers carry.
    grants: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[Place, tuple[int, int]]:
        return self.place, self.inode

    def identity(self) -> Identity:
        labels = {**self.names.labels, "fleet": self.place.fleet}
        return of_sandbox(self.names.sandbox, self.names.tenant, labels, "", False)


class Finder:
    """Looks at fleets; used by one thread at a time."""

    def __init__(self, fleets: Sequence[Fleet], containerd: Path) -> None:
        self._fleets = fleets
        self._bundles = Bundles(containerd)
        self._unknown_since_s: dict[Place, float] = {}
        #: Places whose sandbox containerd has not known for a while.
        self.unknown: list[Place] = []
        self.too_many = False

    def look(self) -> list[Sighting]:
        """Return the sandboxes that are there."""
        seen: list[Sighting] = []
        ids: set[str] = set()
        unknown: list[Place] = []
        self._bundles.look()
        for fleet in self._fleets:
            found = dict(self._named(fleet, fleet.places(), unknown))
            found.update(self._named(fleet, fleet.others({names.id for names in found.values()}), unknown))
            ids |= {place.id for place in found}
            for place, names in found.items():
                sighting = _seen(place, names, self._bundles.grants(names.id) if fleet.by_containerd else frozenset())
                if sighting is not None and names.wanted:
                    seen.append(sighting)
        sockets = {sighting.place.socket for sighting in seen if sighting.place.socket is not None}
        self._note_unknown([place for place in unknown if place.socket not in sockets])
        self._bundles.keep(ids)
        self.too_many = len(seen) > MOST_SANDBOXES
        return seen[:MOST_SANDBOXES]

    def _named(self, fleet: Fleet, places: Iterator[Place], unknown: list[Place]) -> Iterator[tuple[Place, Names]]:
        for place in places:
            names = (
                self._bundles.names(place.id, short=place.short) if fleet.by_containerd else Names(place.id, place.id)
            )
            if names is None:
                unknown.append(place)
            else:
                yield place, names

    def _note_unknown(self, places: list[Place]) -> None:
        now_s = time.monotonic()
        self._unknown_since_s = {place: self._unknown_since_s.get(place, now_s) for place in places}
        self.unknown = [place for place, since_s in self._unknown_since_s.items() if now_s - since_s >= _UNKNOWN_S]


def _seen(place: Place, names: Names, grants: frozenset[str]) -> Sighting | None:
    try:
        directory = os.lstat(place.directory)
    except OSError:
        return None
    owner, listening = directory.st_uid, True
    if place.socket is not None:
        try:
            status = os.lstat(place.socket)
            owner = status.st_uid if stat.S_ISSOCK(status.st_mode) else owner
        except OSError:
            pass  # not there yet, or not any more
        listening = os.path.lexists(f"{place.socket}_{PORT}")
    return Sighting(place, names, (directory.st_dev, directory.st_ino), owner, listening, grants)


class Fleets:
    """Serves what a `Finder` sees. All but the thread's loop runs on the reactor."""

    def __init__(
        self,
        reactor: Reactor,
        attachments: Attachments,
        log: Log,
        finder: Finder,
        present: Callable[[Identity, Iterable[str]], None],
        period_s: float = PERIOD_S,
    ) -> None:
        """
        Args:
            present: Gives a sandbox the grants that it presents.
        """
        self._reactor = reactor
        self._attachments = attachments
        self._log = log
        self._finder = finder
        self._present = present
        #: What each sandbox has presented.
        self._presented: dict[tuple[Place, tuple[int, int]], frozenset[str]] = {}
        self._period_s = period_s
        self._served: dict[tuple[Place, tuple[int, int]], Attachment] = {}
        #: What has been told already, with the reason: once is enough.
        self._refused: dict[tuple[Place, tuple[int, int]], str] = {}
        self._told_unknown: set[Place] = set()
        #: True while a successor may be taking over: what is new is its to find.
        self.paused = False
        self._stop = threading.Event()
        self._again = True
        self._thread = threading.Thread(target=self._run, name="finder", daemon=True)

    def start(self) -> None:
        """Serve what is there before anything else happens, and look for more from now on."""
        self._apply(self._finder.look(), self._finder.unknown)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        last: list[Sighting] | None = None  # what `start` served may be gone by the first look
        failed, told_too_many = "", False
        pause_s = self._period_s
        while not self._stop.wait(pause_s):
            began_s = time.thread_time()
            try:
                seen, unknown = self._finder.look(), self._finder.unknown
            except Exception as error:  # noqa: BLE001 - whatever a strange directory does, the search goes on
                if str(error) != failed:
                    self._log.error("fleets cannot be looked at", error=f"{type(error).__name__}: {error}")
                failed = str(error)
                continue
            pause_s = max(self._period_s, (time.thread_time() - began_s) / _SHARE)
            failed = f"more than {MOST_SANDBOXES} sandboxes" if self._finder.too_many else ""
            if failed and not told_too_many:
                self._log.error("sandboxes not served", error=failed)
            told_too_many = bool(failed)
            if seen != last or self._again or unknown or not all(sighting.listening for sighting in seen):
                last = seen
                self._reactor.post(_applying(self._apply, seen, unknown))

    def _apply(self, seen: list[Sighting], unknown: list[Place]) -> None:
        if self._stop.is_set() or self.paused:
            self._again = True
            return
        by_key = {sighting.key: sighting for sighting in seen}
        for key in [key for key in self._served if key not in by_key]:
            attachment = self._served.pop(key)
            if self._attachments.end_found(attachment):
                self._log.info("sandbox gone", sandbox=attachment.identity.sandbox, reason="its microVM has gone")
        self._refused = {key: reason for key, reason in self._refused.items() if key in by_key}
        self._presented = {key: ids for key, ids in self._presented.items() if key in by_key}
        self._again = False
        for key, sighting in by_key.items():
            known = self._served.get(key)
            try:
                if known is None:
                    self._serve(sighting)
                else:
                    self._attachments.refresh_found(known, sighting.owner, listening=sighting.listening)
            except RemoraError as error:
                self._refuse(sighting, error)
                continue
            further = sighting.grants - self._presented.get(key, frozenset())
            if further:
                self._presented[key] = sighting.grants
                self._present(sighting.identity(), sorted(further))
        for place in unknown:
            if place not in self._told_unknown:
                self._log.error(
                    "sandbox not served",
                    id=place.id,
                    directory=str(place.directory),
                    error="containerd knows no such sandbox, so nobody says whose it is",
                    change="see [fleets] containerd, the state directory of the containerd that started it",
                )
        self._told_unknown = set(unknown)

    def _serve(self, sighting: Sighting) -> None:
        place, identity = sighting.place, sighting.identity()
        attachment = self._attachments.attach_found(
            identity, sighting.names.tenant, place.directory, place.socket, place.cid
        )
        self._served[sighting.key] = attachment
        self._refused.pop(sighting.key, None)
        self._log.info(
            "sandbox found",
            sandbox=identity.sandbox,
            tenant=identity.tenant,
            fleet=place.fleet,
            directory=str(place.directory),
            cid=place.cid,
        )

    def _refuse(self, sighting: Sighting, error: RemoraError) -> None:
        self._again = True
        if self._refused.get(sighting.key) != error.message:
            self._refused[sighting.key] = error.message
            self._log.error(
                "sandbox not served",
                sandbox=sighting.names.sandbox,
                directory=str(sighting.place.directory),
                error=error.message,
                change=error.fix or "",
            )


def _applying(
    apply: Callable[[list[Sighting], list[Place]], None], seen: list[Sighting], unknown: list[Place]
) -> Callable[[], None]:
    return lambda: apply(seen, unknown)
