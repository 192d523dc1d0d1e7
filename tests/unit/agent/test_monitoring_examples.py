"""The example dashboard and alert rules ask for metrics and labels that the agent has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from remora.agent.exposition import FAMILIES

EXAMPLES = Path(__file__).parents[3] / "examples" / "monitoring"
#: What Prometheus itself adds.
_LABELS_OF_ALL = {"instance", "job", "le"}


def expressions() -> Iterator[str]:
    for panel in json.loads((EXAMPLES / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for group in yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            yield rule["expr"]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_an_expression_uses_what_there_is(expression: str) -> None:
    names = set(re.findall(r"\bremora_\w+", expression))
    families = {name: re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert names or expression.startswith("up{")
    for name, family in families.items():
        assert family in FAMILIES, name
        assert (FAMILIES[family].kind in ("histogram", "summary")) == (name != family)
    labels = set(re.findall(r"(\w+)(?:=~?|!=)\"", expression))
    for listed in re.findall(r"by \(([^)]*)\)", expression):
        labels |= set(re.split(r",\s*", listed))
    known = _LABELS_OF_ALL.union(*(FAMILIES[family].labels for family in families.values()))
    assert labels <= known, labels - known


def test_every_metric_of_use_to_an_alarm_or_a_picture_has_a_place() -> None:
    shown = " ".join(expressions())
    for name in ("remora_requests_total", "remora_refusals_total", "remora_stage_seconds", "remora_worker_restarts"):
        assert name in shown
