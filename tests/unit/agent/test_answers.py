"""Remembered answers: found again, bounded, and their memory given back exactly once."""

from __future__ import annotations

import pytest

from remora.agent.answers import Answer, Answers
from remora.agent.policy import Limits
from remora.errors import InvalidArgumentError
from remora.workers.contract import Result, TensorView

PRINT = ("infer", "m", 4)


def answer(size: int = 4) -> tuple[Answer, list[int]]:
    released: list[int] = []
    view = TensorView("o", "uint8", (size,), memoryview(bytes(size)))
    return Answer(Result((view,), release=lambda: released.append(1)), 0), released


def remember(answers: Answers, key: tuple[str, int], size: int = 4) -> list[int]:
    made, released = answer(size)
    answers.end("t", answers.begin(key, PRINT), made)
    made.drop()
    return released


def test_an_answer_is_found_under_its_key_alone() -> None:
    answers = Answers(Limits())
    remember(answers, ("s", 1))
    found = answers.look_up("t", ("s", 1), PRINT)
    assert isinstance(found, Answer)
    found.drop()
    assert answers.look_up("t", ("s", 2), PRINT) is None
    assert answers.look_up("t", ("other session", 1), PRINT) is None
    assert answers.look_up("other tenant", ("s", 1), PRINT) is None


def test_a_request_under_way_is_found_until_it_ends() -> None:
    answers = Answers(Limits())
    flight = answers.begin(("s", 1), PRINT)
    assert answers.look_up("t", ("s", 1), PRINT) is flight
    answers.end("t", flight, None)
    assert answers.look_up("t", ("s", 1), PRINT) is None


def test_a_key_used_for_another_request_is_refused() -> None:
    answers = Answers(Limits())
    remember(answers, ("s", 1))
    with pytest.raises(InvalidArgumentError, match="request_id 1"):
        answers.look_up("t", ("s", 1), ("infer", "m", 5))


def test_memory_is_bounded_by_count_and_given_back() -> None:
    answers = Answers(Limits(answers_per_tenant=3))
    released = [remember(answers, ("s", number)) for number in range(5)]
    assert [len(entry) for entry in released] == [1, 1, 0, 0, 0]
    assert answers.look_up("t", ("s", 0), PRINT) is None


def test_memory_is_bounded_by_bytes() -> None:
    answers = Answers(Limits(answer_bytes_per_tenant=10_000))
    first = remember(answers, ("s", 1), 6000)
    remember(answers, ("s", 2), 6000)
    assert first == [1]
    assert remember(answers, ("s", 3), 20_000) == [1]


def test_an_answer_that_is_being_sent_keeps_its_memory() -> None:
    answers = Answers(Limits())
    released = remember(answers, ("s", 1))
    taken = answers.look_up("t", ("s", 1), PRINT)
    assert isinstance(taken, Answer)
    assert answers.forget_tenant("t")
    assert released == []
    taken.drop()
    assert released == [1]
    assert not answers.forget_tenant("t")


def test_a_session_that_ends_takes_only_its_own_answers_along() -> None:
    answers = Answers(Limits())
    mine, other = remember(answers, ("s", 1)), remember(answers, ("r", 1))
    answers.forget_session("t", "s")
    assert (mine, other) == ([1], [])
