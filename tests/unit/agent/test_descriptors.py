"""The agent takes no more connections than it can have descriptors for."""

from __future__ import annotations

import pytest

from remora.agent import lifecycle
from remora.agent.addresses import parse_address
from remora.agent.main import _within_descriptors
from remora.agent.policy import Policy


@pytest.mark.parametrize(
    ("allowed", "addresses", "connections"),
    [
        (1 << 20, ["unix:///a"], 16384),
        (1 << 20, ["unix:///a", "tls://127.0.0.1:1"], 16384),
        (1024, ["unix:///a"], 512),
        (1024, ["unix:///a", "tls://127.0.0.1:1"], 170),
        (17408, ["tls://127.0.0.1:1"], 5461),
    ],
)
def test_connections_are_bounded_by_the_descriptors_that_each_may_take(
    allowed: int, addresses: list[str], connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "raise_descriptor_limit", lambda wanted: min(allowed, wanted))
    found = _within_descriptors(Policy(), [parse_address(text) for text in addresses])
    assert found.limits.connections == connections
