"""When the SDK resends, how long it waits, and when it gives up: decisions without a clock or a socket."""

from __future__ import annotations

import pytest

from remora.client import calls
from remora.client.continuity import LONGEST_PAUSE_S, MAX_CUTS, MAX_REFUSALS, Continuity, Patience
from remora.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from remora.wire import remora_v1 as v1


def answer(token: bytes, *, resumed: bool = False, forked: bool = False) -> v1.HelloResponse:
    return v1.HelloResponse(
        session_id="s", token=token, resumed=resumed, forked=forked, max_message_bytes=1000, operations=["infer"]
    )


def test_the_token_of_every_answer_is_the_next_one_presented() -> None:
    continuity = Continuity("test/1")
    assert bytes(continuity.hello().token) == b""
    for token, resumed in ((b"one", False), (b"two", True)):
        continuity.greeted(answer(token, resumed=resumed))
        assert bytes(continuity.hello().token) == token


def test_only_a_session_without_our_models_begins_an_epoch() -> None:
    continuity = Continuity("test/1")
    continuity.greeted(answer(b"a"))
    first = continuity.epoch
    continuity.greeted(answer(b"a", resumed=True))
    continuity.greeted(answer(b"b", forked=True))
    assert continuity.epoch == first
    continuity.greeted(answer(b"c"))
    assert continuity.epoch == first + 1


def test_a_forked_process_does_not_present_its_parents_token() -> None:
    continuity = Continuity("test/1")
    continuity.greeted(answer(b"secret"))
    epoch = continuity.epoch
    continuity.forget()
    assert bytes(continuity.hello().token) == b""
    assert continuity.epoch > epoch


def test_request_ids_differ_even_where_the_kernels_generator_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)  # as in two copies of a snapshot
    ids = [calls.new_request_id() for _ in range(1000)]
    assert len(set(ids)) > 990
    assert all(0 < number < 1 << 64 for number in ids)


def test_a_message_the_agent_would_refuse_is_refused_before_it_is_sent() -> None:
    continuity = Continuity("test/1")
    continuity.greeted(answer(b"a"))
    continuity.check_size(1000, "Infer")
    with pytest.raises(InvalidArgumentError, match=r"Infer .* 1001 .* 1000"):
        continuity.check_size(1001, "Infer")


def test_pauses_grow_to_a_bound_and_end_with_the_reconnect_time() -> None:
    patience = Patience("Infer", timeout_s=1000, reconnect_s=10, now_s=0)
    error = UnavailableError("gone", fix="start it")
    now_s, pauses = 0.0, []
    while now_s < 10:
        pauses.append(patience.lost(error, now_s))
        now_s += pauses[-1]
    with pytest.raises(UnavailableError, match=r"did not come back within 10 s: gone") as caught:
        patience.lost(error, now_s)
    assert caught.value.fix == "start it"
    assert now_s == pytest.approx(10)
    assert pauses[0] <= 0.02
    assert max(pauses) <= LONGEST_PAUSE_S
    assert pauses[8] > pauses[0]


def test_a_second_outage_has_a_time_of_its_own() -> None:
    patience = Patience("Infer", timeout_s=1000, reconnect_s=10, now_s=0)
    patience.lost(UnavailableError("gone"), 0)
    patience.back()
    assert patience.lost(UnavailableError("gone"), 100) > 0


def test_the_calls_own_deadline_ends_the_waiting_and_tells_the_reason() -> None:
    patience = Patience("Infer", timeout_s=1, reconnect_s=10, now_s=0)
    patience.lost(UnavailableError("gone"), 0)
    with pytest.raises(DeadlineExceededError, match="within 1 s; last error: gone"):
        patience.left_s(1.5)


def test_a_request_that_ends_every_connection_is_not_sent_for_ever() -> None:
    patience = Patience("Infer", timeout_s=1000, reconnect_s=10, now_s=0)
    assert patience.cut(UnavailableError("gone"), 0) == 0
    for _ in range(MAX_CUTS - 1):
        patience.back()
        assert patience.cut(UnavailableError("gone"), 0) > 0
    with pytest.raises(UnavailableError, match="while this request was under way"):
        patience.cut(UnavailableError("gone"), 0)


def test_an_agent_that_keeps_answering_unavailable_is_believed_at_last() -> None:
    patience = Patience("Infer", timeout_s=1000, reconnect_s=10, now_s=0)
    error = UnavailableError("draining")
    for _ in range(MAX_REFUSALS):
        assert patience.refused(error, 0) > 0
    with pytest.raises(UnavailableError, match="draining"):
        patience.refused(error, 0)
