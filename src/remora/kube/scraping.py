"""Asks every node's agent for its pods' figures, again and again, and keeps them for a window."""

from __future__ import annotations

import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from remora.errors import RemoraError
from remora.kube.fetching import Trust, get
from remora.kube.figures import Figures, Windows, parse

#: Agents asked at once. One that does not answer holds a thread for `fetching.TIMEOUT_S`.
_THREADS = 16
#: Looks that an agent may miss before its figures are old.
_MISSED = 3
#: What may fail besides an agent.
_OWN = {"the agents' addresses", "the certificates"}


class Scraper:
    """`start`, then `figures` from any thread, then `stop`.

    Args:
        agents: Returns where the agents' metrics are, as URLs; asked before every look. May raise RemoraError: then
            those of the last look are asked.
        trust: For agents at `https://`.
    """

    def __init__(
        self, agents: Callable[[], Iterable[str]], trust: Trust, *, interval_s: float = 5.0, window_s: float = 30.0
    ) -> None:
        self._agents = agents
        self._trust = trust
        self._interval_s = interval_s
        self._windows = Windows(window_s, _MISSED * interval_s)
        self._lock = threading.Lock()
        self._known: frozenset[str] = frozenset()
        self._failing: dict[str, str] = {}
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, "scrape")
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def figures(self, namespace: str, pods: Iterable[str]) -> list[tuple[str, Figures]]:
        """Return the figures of those pods that have some."""
        now_s = time.monotonic()
        with self._lock:
            found = [(pod, self._windows.figures((namespace, pod), now_s)) for pod in pods]
        return [(pod, figures) for pod, figures in found if figures is not None]

    def _run(self) -> None:
        while True:
            began_s = time.monotonic()
            self._look()
            if self._stopping.wait(max(0.0, self._interval_s - (time.monotonic() - began_s))):
                return

    def _look(self) -> None:
        try:
            self._known = frozenset(self._agents())
            self._tell("the agents' addresses", "")
        except RemoraError as error:
            self._tell("the agents' addresses", str(error))
        with self._lock:
            self._windows.keep(set(self._known))
        for name in self._failing.keys() - self._known - _OWN:
            del self._failing[name]
        try:
            # Read for each look: certificates are renewed.
            encrypted = any(agent.startswith("https") for agent in self._known)
            context = self._trust.context() if encrypted else None
            self._tell("the certificates", "")
        except RemoraError as error:
            self._tell("the certificates", str(error))
            return
        list(self._pool.map(partial(self._ask, context), self._known))

    def _ask(self, context: ssl.SSLContext | None, agent: str) -> None:
        try:
            text = get(agent, "/metrics", context=context, server_name=self._trust.server_name).decode(errors="replace")
        except RemoraError as error:
            self._tell(agent, str(error))
            return
        self._tell(agent, "")
        pods = parse(text)
        with self._lock:
            self._windows.add(agent, time.monotonic(), pods)

    def _tell(self, what: str, failure: str) -> None:
        """Say what is new, once."""
        if self._failing.get(what, "") != failure:
            self._failing[what] = failure
            text = failure or f"{what}: answers again"
            print(f"remora autoscaling: {text}", file=sys.stderr, flush=True)
