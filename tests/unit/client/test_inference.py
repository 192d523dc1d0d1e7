"""Where an Infer request's tensors lie, and when their memory may be used again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from remora.client import inference
from remora.client.inference import InferAnswer, Inference
from remora.client.region import Region
from remora.client.tensors import Tensor
from remora.errors import DeadlineExceededError, InvalidArgumentError, ProtocolError, UnavailableError
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message

BIG = Tensor(bytes(64 << 10), "uint8")


@pytest.fixture
def region() -> Region:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    return Region(1, fd, 1 << 20)


@pytest.fixture(autouse=True)
def _no_sizes() -> Iterator[None]:
    inference._output_sizes.clear()
    yield
    inference._output_sizes.clear()


def sent(request: Inference, region: Region | None) -> v1.InferRequest:
    """Return what the agent gets."""
    body = request.body(region)
    return v1.InferRequest.decode(body.to_bytes() if isinstance(body, Message) else b"".join(body))


def is_free(region: Region) -> bool:
    parts = region.take([region.size_bytes])
    return parts is not None


def answer(**values: object) -> v1.InferResponse:
    return v1.InferResponse(**values)


def taught() -> Inference:
    """Return a request of which the size of the outputs is known."""
    first = Inference("m", {"x": BIG}, None, 1)
    first.body(None)
    first.answered(answer(outputs=[v1.Tensor(name="y", dtype="uint8", shape=[64 << 10], data=bytes(64 << 10))]), None)
    return Inference("m", {"x": BIG}, None, 2)


def test_a_small_request_needs_no_memory() -> None:
    assert Inference("m", {"x": b"1"}, None, 1).shared_bytes == 0


def test_tensors_are_in_the_message_where_there_is_no_region() -> None:
    message = sent(Inference("m", {"x": BIG}, ["y"], 1), None)
    assert (message.region, bytes(message.inputs[0].data), message.outputs) == (0, bytes(64 << 10), ["y"])


def test_the_place_for_outputs_is_known_from_the_answer_before(region: Region) -> None:
    assert sent(Inference("m", {"x": BIG}, None, 1), region).output_bytes == 0
    message = sent(taught(), region)
    assert (message.region, message.output_bytes) == (1, 64 << 10)


@pytest.mark.parametrize("error", [DeadlineExceededError("late"), UnavailableError("gone"), KeyboardInterrupt()])
def test_what_the_agent_may_still_use_never_comes_back(region: Region, error: BaseException) -> None:
    request = taught()
    request.body(region)
    request.failed(error)
    del request
    assert not is_free(region)


def test_a_region_that_lost_much_is_spent(region: Region) -> None:
    for _ in range(5):
        request = taught()
        request.body(region)
        request.failed(DeadlineExceededError("late"))
    assert region.is_spent


def test_an_answer_that_says_no_gives_everything_back(region: Region) -> None:
    request = taught()
    request.body(region)
    request.failed(InvalidArgumentError("no"))
    assert is_free(region)


def test_a_result_gives_its_memory_back_with_its_last_view(region: Region) -> None:
    request = taught()
    message = sent(request, region)
    region.memory[message.output_offset] = 7
    output = v1.Tensor(name="y", dtype="uint8", shape=[64 << 10], offset=message.output_offset)
    found = request.answered(answer(outputs=[output], region=1), None)["y"]
    part = found.data[:1]
    del found
    assert part[0] == 7
    assert not is_free(region)
    del part, output
    assert is_free(region)


@pytest.mark.parametrize(
    ("offset", "shape", "number"), [(0, [64 << 10], 1), (1 << 19, [1], 1), (65536, [65537], 1), (65536, [1], 2)]
)
def test_an_answer_in_a_place_that_was_not_offered_is_refused(
    region: Region, offset: int, shape: list[int], number: int
) -> None:
    request = taught()
    assert sent(request, region).output_offset == 65536
    with pytest.raises(ProtocolError):
        request.answered(
            answer(outputs=[v1.Tensor(name="y", dtype="uint8", shape=shape, offset=offset)], region=number), None
        )


def test_a_full_region_means_a_message(region: Region) -> None:
    assert is_free(region)  # and taken by that
    assert sent(taught(), region).region == 0


def test_the_id_comes_last_so_that_the_agent_knows_the_rest_by_its_bytes(region: Region) -> None:
    first, second = taught(), taught()
    bodies = []
    for request, number in ((first, 1 << 63), (second, (1 << 63) + 5)):
        request.request_id = number
        bodies.append(b"".join(request.body(region)))  # type: ignore[arg-type]  # pieces, as there is a region
        request.failed(InvalidArgumentError("no"))
        assert v1.InferRequest.decode(bodies[-1]).request_id == number
    assert bodies[0][:-11] == bodies[1][:-11]


def test_an_answer_is_known_by_its_bytes_whatever_its_timing() -> None:
    outputs = [v1.Tensor(name="y", dtype="uint8", shape=[64], offset=128)]
    head = v1.InferResponse(outputs=outputs, region=1).to_bytes()
    found = []
    for timing in (v1.Timing(queue_us=3, run_us=70000), v1.Timing(), v1.Timing(run_us=9)):
        data = head + v1.InferResponse(timing=timing).to_bytes()
        found.append(InferAnswer.decode(data))
        assert (found[-1].region, found[-1].outputs) == (1, outputs)
        assert v1.InferResponse.decode(data).timing == timing
    assert found[1] is found[2]


def test_an_answer_in_the_message_is_never_another_calls() -> None:
    for value in (b"1", b"2"):
        outputs = [v1.Tensor(name="y", dtype="uint8", shape=[1], data=value)]
        message = v1.InferResponse(outputs=outputs, timing=v1.Timing(run_us=3))
        assert bytes(InferAnswer.decode(message.to_bytes()).outputs[0].data) == value
