"""Tells containerd what happened, in order, for as long as somebody listens.

One thread and one queue: an RPC never waits for an event to arrive, and a containerd that restarts gets what happened
meanwhile. The queue is bounded; what falls out of it CRI reads from State and Wait.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time

from remora.errors import RemoraError
from remora.wire.containerd import EVENTS_SERVICE, NAMESPACE_KEY, TOPICS, Empty, Envelope, ForwardRequest, Timestamp
from remora.wire.protobuf import Message
from remora.wire.ttrpc.messages import Any as AnyMessage
from remora.wire.ttrpc.sync import Client

MAX_QUEUED = 2048
CALL_TIMEOUT_S = 5.0
#: Tries of one event, with a second between them, as containerd's own publisher has it.
TRIES = 6
RETRY_S = 1.0


def timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


class Publisher:
    """Sends events to the containerd whose ttrpc socket is at `address`; an empty address drops them."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue: queue.Queue[Envelope | None] = queue.Queue(MAX_QUEUED)
        self._client: Client | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Events that containerd has not taken yet."""
        return self._queue.qsize()

    def publish(self, event: Message) -> None:
        """Queue an event; never blocks."""
        envelope = Envelope(
            timestamp=timestamp(time.time_ns()),
            namespace=self._namespace,
            topic=TOPICS[type(event)],
            event=AnyMessage(
                type_url=f"containerd.events.{type(event).__name__}", value=bytes(b"".join(event.encode()))
            ),
        )
        if self._thread is None and self._address:
            # Not earlier: a fork must find one thread.
            self._thread = threading.Thread(target=self._run, name="events", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(envelope)
        except queue.Full:
            print(
                "remora shim: containerd takes no events; the oldest unsent ones stay, one was dropped", file=sys.stderr
            )

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for `timeout_s` at most."""
        if self._thread is not None:
            deadline_s = time.monotonic() + timeout_s
            try:
                self._queue.put(None, timeout=timeout_s)
            except queue.Full:
                pass  # nobody listens
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self._ended.set()

    def _run(self) -> None:
        while (envelope := self._queue.get()) is not None:
            for attempt in range(TRIES):
                if self._forward(envelope) or self._ended.is_set():
                    break
                if attempt + 1 < TRIES:
                    self._ended.wait(RETRY_S)

    def _forward(self, envelope: Envelope) -> bool:
        try:
            if self._client is None:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.settimeout(CALL_TIMEOUT_S)
                    sock.connect(self._address)
                except OSError:
                    sock.close()
                    raise
                self._client = Client(sock)
            request = ForwardRequest(envelope=envelope)
            metadata = {NAMESPACE_KEY: self._namespace}
            self._client.call(EVENTS_SERVICE, "Forward", request, Empty, timeout_s=CALL_TIMEOUT_S, metadata=metadata)
            return True
        except (OSError, RemoraError):
            if self._client is not None:
                self._client.close()
                self._client = None
            return False
