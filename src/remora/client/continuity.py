"""What lets a session outlive its connections, as values and decisions: no socket, no thread, no clock of its own.

A connection ends whenever the agent restarts, the microVM is restored, cloned or moved, or a forwarder dies. The
session goes on: its token is presented again, and every unanswered request is sent again under the same request id,
which the agent answers once. Both the blocking and the asyncio session decide here, so that they cannot differ.
"""

from __future__ import annotations

import os

from remora.errors import DeadlineExceededError, InvalidArgumentError, RemoraError, UnavailableError
from remora.wire import remora_v1 as v1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Tuple

#: First and longest pause between two attempts to reconnect. The first is shorter than an agent needs to restart, the
#: longest short enough that a function notices a new agent at once.
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0
#: How often a request that the agent itself answered with UNAVAILABLE (it is shutting down, a worker is being replaced)
#: is sent again. Bounded, since the answer may be lasting; a lost connection is bounded by time instead.
MAX_REFUSALS = 4
#: How often the connection may end under one call. The request itself may be what ends it.
MAX_CUTS = 20
#: Hello costs an agent microseconds. One that does not answer for so long is stuck, and another attempt is better.
HELLO_TIMEOUT_S = 5.0
#: How many times a first connection may be accepted and dropped before that is an error: a forwarder in the guest
#: accepts before it knows whether the agent will.
MAX_FIRST_DROPS = 5
#: Largest answer accepted. The agent is trusted with the answer's meaning, so also with its size, within reason.
MAX_ANSWER_BYTES = 1 << 30
#: Chunks of an upload that are under way at once: while one is stored, the next is read and sent.
UPLOAD_WINDOW = 4
#: An agent answers Noop without a worker, so a connection that does not within this time is dead.
PROBE_TIMEOUT_S = 2.0
#: Close is a courtesy: the lease ends the session, too.
CLOSE_TIMEOUT_S = 0.5


class Continuity:
    """Who this session is, across connections."""

    def __init__(self, client: str) -> None:
        self._client = client
        self._token = b""
        #: Counts sessions that the agent began for us without our models: what was loaded in an earlier epoch is gone.
        self.epoch = 0
        self.session_id = ""
        self.agent = ""
        self.operations: Tuple[str, ...] = ()
        self.max_message_bytes = 4 << 20
        #: Memory that the agent would share.
        self.share_bytes = 0
        self.resumed = False
        self.forked = False

    @property
    def token(self) -> bytes:
        return self._token

    def hello(self) -> v1.HelloRequest:
        return v1.HelloRequest(version=v1.VERSION, client=self._client, token=self._token)

    def greeted(self, answer: v1.HelloResponse) -> None:
        """Take the agent's answer to `hello`."""
        if not (answer.resumed or answer.forked):
            self.epoch += 1
        self._token = bytes(answer.token)
        self.session_id = answer.session_id
        self.agent = answer.agent
        self.operations = tuple(answer.operations)
        self.resumed = answer.resumed
        self.share_bytes = answer.share_bytes
        self.forked = answer.forked
        if answer.max_message_bytes:
            self.max_message_bytes = answer.max_message_bytes

    def forget(self) -> None:
        """Start as a new client: the session belongs to another process (after fork)."""
        self._token = b""
        self.epoch += 1

    def check_size(self, size_bytes: int, what: str) -> None:
        """Raise before megabytes are sent that the agent would refuse.

        Raises:
            InvalidArgumentError: the message is larger than the agent takes from this client.
        """
        if size_bytes > self.max_message_bytes:
            raise InvalidArgumentError(
                f"{what} takes a message of {size_bytes} bytes, and the agent accepts {self.max_message_bytes}",
                fix="send less at once, or have the operator raise the agent's message limit",
            )


class Patience:
    """How long one call goes on trying, and how long it pauses between attempts.

    Args:
        timeout_s: For the whole call, retries included.
        reconnect_s: For getting a lost connection back; counts from the moment this call first missed it.
    """

    # Of the class until something goes wrong: one of these is made for every call.
    _give_up_s: Optional[float] = None
    _pause_s = FIRST_PAUSE_S
    _refusals = 0
    _cuts = 0
    _last_error: Optional[RemoraError] = None

    def __init__(self, what: str, *, timeout_s: float, reconnect_s: float, now_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._end_s = now_s + timeout_s
        self._reconnect_s = reconnect_s

    def left_s(self, now_s: float) -> float:
        """Return the time that is left for this call.

        Raises:
            DeadlineExceededError: none is.
        """
        left_s = self._end_s - now_s
        if left_s <= 0:
            raise self.too_late()
        return left_s

    def too_late(self, reason: Optional[RemoraError] = None) -> DeadlineExceededError:
        """Return the error for a call whose time is over; `reason` is why there is no connection."""
        last = reason or self._last_error
        tail = f"; last error: {last}" if last else ""
        error = DeadlineExceededError(f"{self._what}: no answer within {self._timeout_s:g} s{tail}")
        error.__cause__ = last
        return error

    def lost(self, error: RemoraError, now_s: float) -> float:
        """Note that the connection is gone or could not be made; return the pause before the next attempt.

        Raises:
            UnavailableError: the time for reconnecting is over.
            DeadlineExceededError: the call's own time is over.
        """
        self._last_error = error
        if self._give_up_s is None:
            self._give_up_s = now_s + self._reconnect_s
        if now_s >= self._give_up_s:
            raise UnavailableError(
                f"{self._what}: the connection to the agent was lost and did not come back within "
                f"{self._reconnect_s:g} s: {error.message}",
                fix=error.fix or "see whether the agent runs: `remora agent status` on the host",
            ) from error
        return min(self._next_pause_s(), self.left_s(now_s), self._give_up_s - now_s)

    def cut(self, error: RemoraError, now_s: float) -> float:
        """Note that the connection ended while this call was under way; return the pause before it is sent again.

        Raises:
            UnavailableError: this has happened too often.
            DeadlineExceededError: the call's own time is over.
        """
        self._cuts += 1
        if self._cuts > MAX_CUTS:
            raise UnavailableError(
                f"{self._what}: the connection ended {self._cuts} times while this request was under way",
                fix="the request may be what ends it: see the agent's log",
            ) from error
        pause_s = self.lost(error, now_s)
        return 0.0 if self._cuts == 1 else pause_s

    def refused(self, error: UnavailableError, now_s: float) -> float:
        """Note that the agent answered UNAVAILABLE; return the pause, or raise the error if it seems lasting."""
        self._last_error = error
        self._refusals += 1
        if self._refusals > MAX_REFUSALS:
            raise error
        return min(self._next_pause_s(), self.left_s(now_s))

    def back(self) -> None:
        """Note that there is a connection again: the next loss is a new one."""
        self._give_up_s = None

    def _next_pause_s(self) -> float:
        # Half of it by chance, so that all the microVMs of a restarted agent do not come back in the same instant.
        pause_s = self._pause_s * (0.5 + 0.5 * os.urandom(1)[0] / 255)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause_s
