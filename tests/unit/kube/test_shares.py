"""Which shares are preferred, and where devices are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.errors import InvalidArgumentError
from remora.kube import device_plugin_v1beta1 as v1
from remora.kube import numa
from remora.kube.shares import Resource


def preferred(resource: Resource, available: list[str], size: int, must: list[str] | None = None) -> list[str]:
    one = v1.ContainerPreferredRequest(available=available, must_include=must or [], size=size)
    answer = resource.preferred(v1.PreferredRequest(container_requests=[one]))
    return list(answer.container_responses[0].device_ids)


def free(resource: Resource, *counts: int) -> list[str]:
    """Return the last `counts[d]` shares of each device."""
    per = resource.shares_per_device
    return [f"{resource.kind}{d}-{s}" for d, count in enumerate(counts) for s in range(per - count, per)]


@pytest.mark.parametrize(
    ("placement", "counts", "size", "devices"),
    [
        ("pack", (4, 2, 3), 2, {1: 2}),  # the tightest that holds it
        ("pack", (4, 2, 3), 3, {2: 3}),
        ("pack", (4, 2, 3), 5, {0: 4, 1: 1}),  # no device holds it: the most first, then the tightest
        ("spread", (3, 2, 4), 2, {2: 2}),
        ("spread", (2, 2, 2), 3, {0: 2, 1: 1}),
        ("pack", (4, 4, 4), 12, {0: 4, 1: 4, 2: 4}),
    ],
)
def test_a_request_goes_where_placement_says(
    placement: str, counts: tuple[int, ...], size: int, devices: dict[int, int]
) -> None:
    resource = Resource("gpu", 3, 4, placement)
    chosen = preferred(resource, free(resource, *counts), size)
    assert Counter(int(one[3]) for one in chosen) == devices


def test_what_is_given_already_draws_the_rest_to_its_device() -> None:
    resource = Resource("gpu", 3, 4)
    available = free(resource, 4, 1, 4)
    assert preferred(resource, available, 2, ["gpu2-0"]) == ["gpu2-0", "gpu2-1"]


def test_a_second_device_is_of_the_same_numa_node() -> None:
    resource = Resource("gpu", 4, 2, nodes={0: 0, 1: 1, 2: 1, 3: 0})
    assert preferred(resource, free(resource, 2, 2, 2, 2), 4) == ["gpu0-0", "gpu0-1", "gpu3-0", "gpu3-1"]
    listed = resource.listed(healthy=True).devices
    assert [one.topology.nodes[0].id for one in listed if one.topology] == [0, 0, 1, 1, 1, 1, 0, 0]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    placement=st.sampled_from(["pack", "spread"]),
    data=st.data(),
)
def test_the_choice_is_as_large_as_asked_for_and_of_what_is_available(
    counts: list[int], placement: str, data: st.DataObject
) -> None:
    resource = Resource("cpu", len(counts), 4, placement)
    available = free(resource, *counts)
    must = data.draw(st.lists(st.sampled_from(available), unique=True)) if available else []
    size = data.draw(st.integers(len(must), len(available)))
    chosen = preferred(resource, available, size, must)
    assert len(chosen) == len({*chosen}) == size
    assert {*must} <= {*chosen} <= {*available}


@pytest.mark.parametrize(("available", "size"), [(["gpu9-0"], 1), (["gpu0-0"], 2), (["../x"], 1), ([], -1)])
def test_what_cannot_be_chosen_is_refused(available: list[str], size: int) -> None:
    with pytest.raises(InvalidArgumentError):
        preferred(Resource("gpu", 1, 2), available, size)


def test_devices_say_their_numa_node_where_there_are_several(tmp_path: Path) -> None:
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    for address, node in (("0000:81:00.0", "1"), ("0000:01:00.0", "0"), ("0000:C1:00.0", "-1")):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        device = tmp_path / "sys/bus/pci/devices" / address.lower()
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    assert numa.nodes("gpu", tmp_path) == {0: 0, 1: 1}


def test_a_machine_with_one_node_says_none(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    assert numa.nodes("cpu", tmp_path) == {}
