"""What an operator learns of a refusal: the rule, its value and what to change; never what a guest made up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent_bench import agent_core
from remora.agent.identity import Identity
from remora.agent.peers import Peer
from remora.agent.policy import Limits, Policy, parse
from remora.agent.refusals import explain, of_limit
from remora.errors import (
    AbortedError,
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.wire.ttrpc.frames import MessageTooLargeError

POLICY = Policy(limits=Limits(queue_length_per_tenant=7))


def refused(action: Callable[[], object]) -> RemoraError:
    with pytest.raises(RemoraError) as caught:
        action()
    return caught.value


def test_a_limit_is_named_with_its_value_and_the_section_to_change() -> None:
    error = ResourceExhaustedError("7 requests of this tenant wait already (limits.queue_length_per_tenant)")
    found = explain(error, POLICY, "/etc/agent.toml")
    assert (found.code, found.rule, found.value) == ("RESOURCE_EXHAUSTED", "limits.queue_length_per_tenant", "7")
    assert "queue_length_per_tenant under [limits] in /etc/agent.toml" in found.change


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        ('[defaults]\nmodels = ["other"]\n', "[defaults] models", '["other"]'),
        ('[tenant."uid:1"]\nmodels = ["a", "b (c)"]\n', '[tenant."uid:1"] models', '["a", "b (c)"]'),
        ('[[label]]\nmatch = { tier = "x" }\nmodels = ["z"]\n', "[[label]] 1 models", '["z"]'),
    ],
)
def test_a_rule_of_policy_is_named_as_the_file_has_it(text: str, rule: str, value: str) -> None:
    terms = parse(text, "p.toml").rules.terms("uid:1", {"tier": "x"})
    found = explain(refused(lambda: terms.check("models", "identity")), POLICY)
    assert (found.code, found.rule, found.value) == ("PERMISSION_DENIED", rule, value)
    assert "in p.toml and send SIGHUP" in found.change


@pytest.mark.parametrize(
    "text",
    [
        "tensor '(limits.made_up)' has the unknown dtype",
        "tensor '(store.__class__)' is none",
        "name '(rule [defaults] made_up = 3 in x)'",
        "(limits.)",
        "(workers.__init__)",
    ],
)
def test_what_a_guest_makes_up_is_no_rule(text: str) -> None:
    found = explain(InvalidArgumentError(text), POLICY)
    assert (found.rule, found.value) == ("INVALID_ARGUMENT", "")


@pytest.mark.parametrize("part", ["(rule [defaults] models = ", " in ", "(limits.", "(rule [tenant."])
def test_a_guests_text_costs_no_more_than_its_length(part: str) -> None:
    began_s = time.process_time()
    explain(InvalidArgumentError(part * (200_000 // len(part))), POLICY)
    assert time.process_time() - began_s < 0.2


def test_the_agents_own_word_comes_last_and_counts() -> None:
    error = PermissionDeniedError("model '(limits.message_bytes)' does not fit (limits.connections)")
    assert explain(error, POLICY).rule == "limits.connections"


def test_a_message_that_is_too_large_names_its_limit() -> None:
    found = explain(MessageTooLargeError("a message of 9 bytes was sent"), POLICY)
    assert found.rule == "limits.message_bytes"
    assert found.value == str(POLICY.limits.message_bytes)


def test_failures_without_a_rule_say_what_an_operator_can_do() -> None:
    assert "worker died" in explain(AbortedError("two workers died"), POLICY).change
    assert "report" in explain(InternalError("x"), POLICY).change
    assert explain(InvalidArgumentError("x"), POLICY).change == ""
    assert of_limit("limits.hello_timeout_s", POLICY).value == str(POLICY.limits.hello_timeout_s)


def test_a_refused_request_is_one_line_with_everything_to_act_on(tmp_path: Path) -> None:
    policy = replace(Policy(), limits=POLICY.limits)
    with agent_core(tmp_path, policy) as core:
        error = ResourceExhaustedError("too many (limits.queue_length_per_tenant)", fix="send fewer")
        core.refused("native", "Infer", Peer(Identity("sandbox:web", "tenant:shop", "web"), 0.0), error, model="m")
    (line,) = (tmp_path / "log").read_text().splitlines()
    for part in (
        "request refused tenant=tenant:shop peer=sandbox:web door=native operation=Infer model=m",
        "code=RESOURCE_EXHAUSTED rule=limits.queue_length_per_tenant value=7",
        'told="send fewer" change="raise queue_length_per_tenant under [limits]',
    ):
        assert part in line
    assert core.metrics.tenants["tenant:shop"].refusals == {"limits.queue_length_per_tenant": 1}


def test_a_worker_that_dies_is_a_line(tmp_path: Path) -> None:
    with agent_core(tmp_path) as core:
        core.workers.on_death("uid:1", "it was ended by signal 9")
    assert "worker died tenant=uid:1" in (tmp_path / "log").read_text()


def test_json_lines_have_the_same_fields(tmp_path: Path) -> None:
    from remora.agent.logs import Log

    with (tmp_path / "log").open("wb") as file:
        log = Log(file.fileno(), json_lines=True)
        log.of_tenant("t", "request refused", rule="limits.x", value="7")
        log.close()
    entry = json.loads((tmp_path / "log").read_text())
    assert (entry["event"], entry["tenant"], entry["rule"], entry["value"]) == ("request refused", "t", "limits.x", "7")
