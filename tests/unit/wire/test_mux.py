"""Two muxes over a byte stream that arrives in any pieces; and one mux against peers that break rules or streams."""

from __future__ import annotations

import os
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.errors import ProtocolError, ResourceExhaustedError
from remora.wire import mux_frames as frames
from remora.wire.mux import (
    ABORTED,
    BUSY,
    REFUSED,
    RESTARTED,
    Accepted,
    Data,
    Event,
    HalfClosed,
    Mux,
    Opened,
    PeerRestarted,
    Rejected,
    Reset,
    Synced,
    Writable,
)

WINDOW = 8192


class Link:
    """Two muxes and what is under way between them."""

    def __init__(self, *, seed: int = 0, **options: int) -> None:
        self.random = random.Random(seed)
        self.host = Mux(True, window_bytes=WINDOW, **options)  # type: ignore[arg-type]  # of a test's choice
        self.guest = Mux(False, window_bytes=WINDOW, **options)  # type: ignore[arg-type]
        self.to_guest = bytearray()
        self.to_host = bytearray()
        self.host_events: list[Event] = []
        self.guest_events: list[Event] = []

    def write(self) -> None:
        self.to_guest += b"".join(self.host.outgoing(1 << 16))
        self.to_host += b"".join(self.guest.outgoing(1 << 16))

    def step(self) -> bool:
        self.write()
        moved = False
        for mux, wire, events in (
            (self.guest, self.to_guest, self.guest_events),
            (self.host, self.to_host, self.host_events),
        ):
            if wire:
                count = self.random.choice((1, 7, 16, 100, 4096, len(wire)))
                chunk = bytes(wire[:count])
                del wire[:count]
                events.extend(mux.receive(chunk))
                moved = True
        return moved

    def settle(self) -> None:
        for _ in range(200_000):
            if not self.step() and not self.host.has_outgoing and not self.guest.has_outgoing:
                return
        pytest.fail("the muxes never come to rest")

    def connect(self, port: int = 5) -> int:
        stream = self.host.open(port)
        self.settle()
        self.guest.accept(stream)
        self.settle()
        self.host_events.clear()
        self.guest_events.clear()
        return stream


def payload_of(events: list[Event], stream: int) -> bytes:
    return b"".join(event.payload for event in events if isinstance(event, Data) and event.stream == stream)


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


# -- the rules, one by one --------------------------------------------------------------------------------------------


def test_a_stream_is_opened_by_port_and_accepted() -> None:
    link = Link()
    stream = link.host.open(1024)
    link.settle()
    assert Opened(stream, 1024) in link.guest_events
    link.guest.accept(stream)
    link.settle()
    assert link.host_events[-1] == Accepted(stream)


def test_either_end_opens_streams_whose_numbers_never_meet() -> None:
    link = Link()
    link.settle()
    opened = {link.host.open(1), link.host.open(1), link.guest.open(2), link.guest.open(2)}
    assert len(opened) == 4


def test_a_rejected_stream_is_gone_at_both_ends() -> None:
    link = Link()
    stream = link.host.open(9)
    link.settle()
    link.guest.reject(stream)
    link.settle()
    assert link.host_events[-1] == Rejected(stream, REFUSED)
    assert (link.host.streams, link.guest.streams) == (0, 0)


def test_data_stops_at_the_window_and_goes_on_when_it_is_consumed() -> None:
    link = Link()
    stream = link.connect()
    data = os.urandom(3 * WINDOW)
    sent = link.host.send(stream, data)
    assert sent == WINDOW
    assert link.host.send(stream, b"more") == 0
    link.settle()
    assert Writable(stream) not in link.host_events
    got = payload_of(link.guest_events, stream)
    while len(got) < len(data):
        link.guest_events.clear()
        link.guest.consumed(stream, WINDOW)
        link.settle()
        assert Writable(stream) in link.host_events
        link.host_events.clear()
        sent += link.host.send(stream, data[sent:])
        link.settle()
        got += payload_of(link.guest_events, stream)
    assert got == data


def test_half_close_lets_the_other_direction_go_on() -> None:
    link = Link()
    stream = link.connect()
    link.host.send(stream, b"last words")
    link.host.close_write(stream)
    link.settle()
    assert payload_of(link.guest_events, stream) == b"last words"
    assert link.guest_events[-1] == HalfClosed(stream)
    link.guest.send(stream, b"reply")
    link.guest.close_write(stream)
    link.settle()
    assert payload_of(link.host_events, stream) == b"reply"
    assert link.host_events[-1] == HalfClosed(stream)
    assert (link.host.streams, link.guest.streams) == (0, 0)


def test_a_reset_drops_what_is_queued() -> None:
    link = Link()
    stream = link.connect()
    link.host.send(stream, b"never sent")
    link.host.reset(stream)
    link.settle()
    assert link.guest_events == [Reset(stream, ABORTED)]
    assert link.host.send(stream, b"x") == 1
    assert not link.host.has_outgoing


def test_a_large_transfer_does_not_starve_a_small_one() -> None:
    host = Mux(True, window_bytes=1 << 22, flush=False)
    guest = Mux(False, window_bytes=1 << 22)
    large, small = host.open(1), host.open(2)
    for _ in range(3):
        guest.receive(b"".join(host.outgoing()))
        host.receive(b"".join(guest.outgoing()))
    guest.accept(large)
    guest.accept(small)
    host.receive(b"".join(guest.outgoing()))
    assert host.send(large, bytes(1 << 22)) == 1 << 22
    host.send(small, b"quick")
    events = guest.receive(b"".join(host.outgoing(1 << 20)))
    first_small = next(index for index, event in enumerate(events) if event.stream == small)
    assert first_small <= 1
    assert all(len(event.payload) <= frames.MAX_PAYLOAD_BYTES for event in events if isinstance(event, Data))


def test_a_callers_buffer_may_be_used_again_after_send() -> None:
    link = Link()
    stream = link.connect()
    buffer = bytearray(b"first")
    link.host.send(stream, buffer)
    buffer[:] = b"xxxxx"
    link.settle()
    assert payload_of(link.guest_events, stream) == b"first"


def test_streams_opened_before_the_peer_is_there_wait_for_it() -> None:
    host = Mux(True)
    stream = host.open(7)
    first = b"".join(host.outgoing())
    guest = Mux(False)
    guest.receive(first)
    host.receive(b"".join(guest.outgoing()))
    events = guest.receive(b"".join(host.outgoing()))
    assert events == [Synced(host._epoch), Opened(stream, 7)]


def test_no_more_streams_than_allowed() -> None:
    link = Link(max_streams=3)
    link.settle()
    streams = [link.host.open(1) for _ in range(3)]
    with pytest.raises(ResourceExhaustedError):
        link.host.open(1)
    link.settle()
    own = Mux(False, max_streams=2, flush=False)
    sync(own)
    own.receive(b"".join(frames.frame(frames.OPEN, number, 1) for number in (1, 3, 5)))
    assert own.streams == 2
    assert frames.frame(frames.REJECT, 5, BUSY) in b"".join(own.outgoing())
    assert len(streams) == 3


# -- a cut stream, a restored guest, a new host -----------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 5, 15, 16, 17, 100, 3000])
def test_a_new_host_meets_a_guest_that_waits_for_the_rest_of_a_frame(cut: int) -> None:
    link = Link()
    stream = link.connect()
    link.host.send(stream, b"a" * 4000)
    link.write()
    link.guest_events.extend(link.guest.receive(bytes(link.to_guest[:cut])))
    link.to_guest.clear()
    link.guest.send(stream, b"b" * 4000)
    link.to_host += b"".join(link.guest.outgoing())
    del link.to_host[:cut]  # the new host sees the tail of what the guest wrote for the old one
    link.host = Mux(True, window_bytes=WINDOW)
    new = link.host.open(6)
    link.settle()
    assert Reset(stream, RESTARTED) in link.guest_events
    assert PeerRestarted in kinds(link.guest_events)
    assert payload_of(link.guest_events, stream) == b""
    assert payload_of(link.host_events, stream) == b""
    assert Opened(new, 6) in link.guest_events
    assert link.host.synced
    assert link.guest.synced


def test_clones_of_one_guest_each_meet_their_own_host() -> None:
    link = Link()
    link.connect()
    epoch = link.guest._epoch
    for _ in range(2):
        clone = Link()
        clone.guest = Mux(False, window_bytes=WINDOW, epoch=epoch)
        clone.guest._peer_epoch = link.host._epoch
        stream = clone.host.open(3)
        clone.settle()
        assert clone.guest_events[-1] == Opened(stream, 3)


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 2000), st.integers(0, 1 << 16))
def test_garbage_in_the_middle_ends_all_streams_and_the_ends_meet_again(junk: bytes, at: int, seed: int) -> None:
    link = Link(seed=seed)
    stream = link.connect()
    link.host.send(stream, bytes(range(256)) * 6)
    link.write()
    at = min(at, len(link.to_guest))
    if junk in (link.to_guest[at:], b""):
        return
    link.to_guest[at:at] = junk
    try:
        link.settle()
        # A junk that waits for more bytes shows itself when they come.
        link.host.send(stream, b"z" * 2000)
        for _ in range(40):
            if Reset(stream, RESTARTED) in link.guest_events:
                break
            link.to_guest += bytes(frames.MAX_PAYLOAD_BYTES // 16)
            link.settle()
    except ProtocolError:
        return
    got = payload_of(link.guest_events, stream)
    assert (bytes(range(256)) * 6 + b"z" * 2000).startswith(got)
    assert Reset(stream, RESTARTED) in link.guest_events
    link.settle()
    new = link.host.open(8)
    link.settle()
    assert Opened(new, 8) in link.guest_events


# -- hostile peers ----------------------------------------------------------------------------------------------------


def sync(mux: Mux, epoch: int = 77) -> None:
    """Play the peer's part of the greeting."""
    mux.receive(frames.frame(frames.HELLO, epoch, mux._epoch))
    mux.outgoing()
    assert mux.synced


def victim() -> Mux:
    """A host with stream 1 (its own, accepted) and stream 2 (the peer's, accepted)."""
    mux = Mux(True, window_bytes=WINDOW, max_streams=8)
    sync(mux)
    own = mux.open(1)
    mux.outgoing()
    mux.receive(frames.frame(frames.ACCEPT, own, 0) + frames.frame(frames.OPEN, 2, 5))
    mux.accept(2)
    mux.outgoing()
    return mux


def data(stream: int, payload: bytes) -> bytes:
    return b"".join(frames.data_frame(stream, payload))


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(data(1, bytes(WINDOW + 1)), id="more data than allowed"),
        pytest.param(data(1, bytes(WINDOW)) + data(1, b"x"), id="more data than allowed, in two frames"),
        pytest.param(data(99, b"x"), id="data on a stream of ours that was never opened"),
        pytest.param(data(98, b"x"), id="data on a stream of theirs that was never opened"),
        pytest.param(data(0, b"x"), id="data on stream 0"),
        pytest.param(frames.frame(frames.OPEN, 3, 1), id="open with our parity"),
        pytest.param(frames.frame(frames.OPEN, 2, 1), id="open twice"),
        pytest.param(frames.frame(frames.OPEN, 0, 1), id="open 0"),
        pytest.param(frames.frame(frames.ACCEPT, 1, 0), id="accept twice"),
        pytest.param(frames.frame(frames.ACCEPT, 2, 0), id="accept what it opened itself"),
        pytest.param(frames.frame(frames.REJECT, 2, 1), id="reject what it opened itself"),
        pytest.param(frames.frame(frames.WINDOW, 1, 0), id="empty window"),
        pytest.param(frames.frame(frames.WINDOW, 1, 0xFFFFFFFF) * 2, id="overflowing window"),
        pytest.param(frames.frame(frames.FIN, 2, 0) * 2, id="end twice"),
        pytest.param(frames.frame(frames.FIN, 2, 0) + data(2, b"x"), id="data after the end"),
        pytest.param(frames.frame(frames.OPEN, 4, 1) + data(4, b"x"), id="data before it was accepted"),
        pytest.param(
            b"".join(frames.frame(frames.OPEN, number, 1) for number in range(4, 8000, 2)), id="opens without reading"
        ),
    ],
)
def test_a_broken_rule_is_a_protocol_error(attack: bytes) -> None:
    with pytest.raises(ProtocolError):
        victim().receive(attack)


def test_a_generous_window_does_not_make_this_end_queue_without_bound() -> None:
    mux = victim()
    mux.receive(frames.frame(frames.WINDOW, 1, 0xFFFF0000))
    taken = sum(mux.send(1, bytes(1 << 20)) for _ in range(10))
    assert taken <= 65536


def allowed_bytes(mux: Mux) -> int:
    return sum(stream.allowed for stream in mux._streams.values())


def test_a_peer_that_opens_many_streams_may_fill_its_first_ones_and_little_of_the_others() -> None:
    mux = Mux(True, epoch=1)
    mux.receive(frames.frame(frames.HELLO, 2, 1))
    opened = [2 * number for number in range(1, 1025)]
    for stream in opened:
        mux.receive(frames.frame(frames.OPEN, stream, 1))
        mux.accept(stream)
    assert mux._streams[opened[16]].allowed == 256 << 10, "as many as a guest really has are not held back"
    assert all(mux._streams[stream].allowed >= 16 << 10 for stream in opened)
    assert allowed_bytes(mux) <= 32 << 20
    # What was consumed is given back, also of the smallest window.
    last = opened[-1]
    mux.receive(b"".join(map(bytes, frames.data_frame(last, bytes(16 << 10)))))
    mux.consumed(last, 16 << 10)
    assert mux._streams[last].allowed == 16 << 10
    mux.outgoing()
    for stream in opened:
        mux.receive(frames.frame(frames.RESET, stream, ABORTED))
    mux.receive(frames.frame(frames.OPEN, 4096, 1))
    mux.accept(4096)
    assert allowed_bytes(mux) == 256 << 10


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_random_bytes_raise_nothing_but_protocol_errors_and_are_not_kept(chunks: list[bytes]) -> None:
    mux = victim()
    try:
        for chunk in chunks:
            mux.receive(chunk)
    except ProtocolError:
        return
    assert len(mux._reader._buf) <= frames.MAX_PAYLOAD_BYTES + 20 + 300


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([frames.OPEN, frames.ACCEPT, frames.REJECT, frames.WINDOW, frames.FIN, frames.RESET, 5, 1]),
            st.integers(0, 9),
            st.integers(0, 70_000),
        ),
        max_size=30,
    )
)
def test_well_formed_nonsense_is_bounded(nonsense: list[tuple[int, int, int]]) -> None:
    mux = victim()
    try:
        for kind, stream, value in nonsense:
            if kind == frames.DATA:
                mux.receive(data(stream, bytes(min(value + 1, frames.MAX_PAYLOAD_BYTES))))
            else:
                mux.receive(frames.frame(kind, stream, value))
            assert mux.streams <= 8
    except ProtocolError:
        return
    assert sum(map(len, mux.outgoing(1 << 30))) < 100_000


# -- anything, against a model ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_whatever_is_done_each_stream_delivers_its_bytes_in_order(seed: int) -> None:
    link = Link(seed=seed, max_streams=6)
    rng = random.Random(seed ^ 1)
    ends = {"host": link.host, "guest": link.guest}
    sent: dict[tuple[str, int], bytearray] = defaultdict(bytearray)
    got: dict[tuple[str, int], bytearray] = defaultdict(bytearray)
    unread: dict[tuple[str, int], int] = defaultdict(int)
    ended: dict[tuple[str, int], bool] = {}
    reset: set[int] = set()
    live: list[int] = []

    def absorb() -> None:
        for name, events, other in (("host", link.host_events, "guest"), ("guest", link.guest_events, "host")):
            for event in events:
                key = (other, event.stream)
                if isinstance(event, Opened):
                    ends[name].accept(event.stream)
                    live.append(event.stream)
                elif isinstance(event, Data):
                    assert not ended.get(key)
                    got[key] += event.payload
                    unread[name, event.stream] += len(event.payload)
                    assert unread[name, event.stream] <= WINDOW
                elif isinstance(event, HalfClosed):
                    ended[key] = True
                elif isinstance(event, Reset):
                    reset.add(event.stream)
            events.clear()

    for _ in range(150):
        name = rng.choice(("host", "guest"))
        mux = ends[name]
        action = rng.random()
        if action < 0.1 and mux.streams < 6:
            mux.open(rng.randrange(10))
        elif action < 0.5 and live:
            stream = rng.choice(live)
            if stream not in reset and not ended.get((name, stream)):
                chunk = rng.randbytes(rng.choice((1, 50, 5000)))
                if stream in mux._streams and not mux._streams[stream].fin_due:
                    sent[name, stream] += chunk[: mux.send(stream, chunk)]
        elif action < 0.55 and live:
            mux.close_write(rng.choice(live))
        elif action < 0.58 and live:
            stream = rng.choice(live)
            reset.add(stream)
            mux.reset(stream)
        elif action < 0.8:
            for key in [key for key in unread if key[0] == name]:
                mux.consumed(key[1], unread.pop(key))
        for _ in range(rng.randrange(4)):
            link.step()
        absorb()
    link.settle()
    absorb()
    for key, data_sent in sent.items():
        if key[1] in reset:
            assert data_sent.startswith(got[key])
        else:
            assert got[key] == data_sent
