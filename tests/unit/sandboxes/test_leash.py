"""The line between monitor and maker."""

from __future__ import annotations

import pytest

from remora.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError
from remora.sandboxes import leash


def test_messages_stay_apart_and_the_end_is_seen() -> None:
    ours, theirs = leash.pair()
    with ours:
        assert leash.send(theirs, {"event": "a"})
        assert leash.send(theirs, {"event": "b"})
        theirs.close()
        assert [leash.receive(ours, 5) for _ in range(3)] == [{"event": "a"}, {"event": "b"}, None]
        assert not leash.send(ours, {"do": "stop"})


def test_silence_meets_the_deadline() -> None:
    ours, theirs = leash.pair()
    with ours, theirs, pytest.raises(DeadlineExceededError):
        leash.receive(ours, 0.01)


def test_an_error_arrives_as_the_same_error() -> None:
    error = leash.restore(leash.describe(FailedPreconditionError("no QEMU", fix="install it")))
    assert isinstance(error, FailedPreconditionError)
    assert (error.message, error.fix) == ("no QEMU", "install it")
    assert isinstance(leash.restore(leash.describe(OSError(28, "No space left on device", "/x"))), UnavailableError)
    assert "ValueError" in leash.restore(leash.describe(ValueError("odd"))).message
