"""Clients that ask a service without a pause, know each right answer, and account for every request.

What may happen to a request, and how it is counted:

* *right* or *wrong*: an answer (status 200) came.
* *turned away*: it was never accepted, so the client sends it again. Either no connection came about or it was closed
  before the request was sent in full (no pod is ready, or one has just ended), or the service said 503 because its
  accelerator was away, or 429 because the pod has used its grant.
* *lost*: it was sent in full and no answer came, or another status. There must be none.

A request ends only with an answer, so nothing that was turned away is forgotten.

As a program it does the same where a test cannot reach the service itself (`pod_load`): see `main`.
"""

from __future__ import annotations

import base64
import http.client
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

CONNECT_S = 5.0
ANSWER_S = 60.0


@dataclass
class Tally:
    """What became of the requests so far."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    turned_away: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.right += other.right
        self.wrong += other.wrong
        self.lost += other.lost
        self.turned_away += other.turned_away
        self.latencies_ms += other.latencies_ms

    def __str__(self) -> str:
        away = ", ".join(f"{count} {why}" for why, count in sorted(self.turned_away.items())) or "none"
        line = f"{self.right} right, {len(self.wrong)} wrong, {len(self.lost)} lost; turned away: {away}"
        if len(self.latencies_ms) > 1:
            cuts = statistics.quantiles(self.latencies_ms, n=100, method="inclusive")
            line += f"; median {cuts[49]:.0f} ms, p99 {cuts[98]:.0f} ms"
        return line


class TurnedAway(Exception):
    """The request was not accepted; its text says why, in two words."""


class ConstantLoad:
    """`with ConstantLoad(address, answers):` has `clients` threads ask one question after the other.

    Args:
        address: host and port of the service.
        answers: pictures and the index of the label that each must get.
    """

    def __init__(self, address: tuple[str, int], answers: Sequence[tuple[bytes, int]], clients: int = 2) -> None:
        self._address = address
        self._questions = answers
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(clients)]
        self._tally = Tally()
        self.total = Tally()

    def __enter__(self) -> ConstantLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.lap()

    @property
    def right(self) -> int:
        """Right answers since the last `lap`."""
        return self._tally.right

    def lap(self) -> Tally:
        """Return what happened since the last lap, and begin the next."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
            self.total.add(tally)
        return tally

    def _ask_on(self, number: int) -> None:
        while not self._stop.is_set():
            picture, label = self._questions[number % len(self._questions)]
            number += 1
            self._ask(picture, label)

    def _ask(self, picture: bytes, label: int) -> None:
        while True:
            began_s = time.monotonic()
            try:
                found = self.ask(picture)
            except TurnedAway as why:
                with self._lock:
                    self._tally.turned_away[str(why)] += 1
                if self._stop.wait(0.1):
                    return
                continue
            except (OSError, http.client.HTTPException, ValueError) as error:
                with self._lock:
                    self._tally.lost.append(f"after {time.monotonic() - began_s:.2f} s: {error!r}")
                return
            with self._lock:
                if found == label:
                    self._tally.right += 1
                    self._tally.latencies_ms.append((time.monotonic() - began_s) * 1000)
                else:
                    self._tally.wrong.append(f"{found} in place of {label}")
            return

    def ask(self, picture: bytes) -> int:
        """Ask once; return the label."""
        connection = http.client.HTTPConnection(*self._address, timeout=CONNECT_S)
        try:
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER_S)
                connection.request("POST", "/classify", picture)
            except ConnectionRefusedError:
                raise TurnedAway("refused") from None
            except TimeoutError:
                raise TurnedAway("unreachable") from None
            except (ConnectionError, OSError):
                raise TurnedAway("closed") from None
            answer = connection.getresponse()
            body = answer.read()
            if answer.status in (429, 503):
                raise TurnedAway(str(answer.status))
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {body[:200]!r}")
            return int(json.loads(body)["labels"][0][0])
        finally:
            connection.close()


def right_ones(load: ConstantLoad, pictures: Sequence[tuple[bytes, int]], timeout_s: float) -> list[tuple[bytes, int]]:
    """Return those that the service's model gets right at all, once it answers."""
    deadline_s = time.monotonic() + timeout_s
    found = []
    for picture, label in pictures:
        while True:
            try:
                if load.ask(picture) == label:
                    found.append((picture, label))
                break
            except (TurnedAway, OSError, http.client.HTTPException, ValueError):
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)
    return found


def main() -> None:
    """Take a line of JSON from standard input and answer with one, until its end.

    The first has `address`, `clients`, `timeout_s` and `pictures`: pairs of base64 and the label that a picture's name
    tells. Its answer is the number of pictures that the model gets right, which the clients then ask for. Each other
    line is answered with the tally since the last.
    """
    order = json.loads(sys.stdin.readline())
    host, port = order["address"]
    pictures = [(base64.b64decode(text), label) for text, label in order["pictures"]]
    known = right_ones(ConstantLoad((host, port), []), pictures, order["timeout_s"])
    print(json.dumps(len(known)), flush=True)
    with ConstantLoad((host, port), known, order["clients"] if known else 0) as load:
        for _ in sys.stdin:
            print(json.dumps(vars(load.lap())), flush=True)


if __name__ == "__main__":
    main()
