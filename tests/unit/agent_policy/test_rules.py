"""What policy grants: which rule wins, what is refused and by which name, and files that nobody should write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent import policy
from remora.agent.hints import retry_after_s
from remora.agent.quotas import Bucket, Quotas
from remora.agent.rules import Rules
from remora.cli import main as cli
from remora.errors import InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError

FILE = """
[defaults]
models = ["identity"]
requests_per_s = 10
[[label]]
match = { tier = "gold*" }
weight = 3
models = ["*"]
[tenant."acme"]
models = ["own-*"]
"""


def rules(text: str = FILE) -> Rules:
    return policy.parse(text, "/etc/remora/agent.toml").rules


def test_the_tenants_own_table_wins_over_labels_and_those_over_defaults() -> None:
    assert rules().terms("x", {}).values["models"] == ("identity",)
    gold = rules().terms("x", {"tier": "golden"})
    assert (gold.values["models"], gold.share.weight) == (("*",), 3.0)
    assert rules().terms("tenant:acme", {"tier": "gold"}).values["models"] == ("own-*",)


def test_a_refusal_names_file_table_key_and_value() -> None:
    with pytest.raises(PermissionDeniedError) as refused:
        rules().terms("tenant:acme", {}).check("models", "efficientnet")
    assert 'rule [tenant."acme"] models = ["own-*"] in agent.toml' in refused.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[defaults]\nwieght = 1", r"\[defaults\] has no key `wieght`"),
        ("[defaults]\nweight = 0", "weight = 0 is not a number from 0.01"),
        ("[defaults]\nweight = nan", "not a number from"),
        ("[defaults]\nsessions = true", "not a whole number"),
        ("[defaults]\nmodels = 'x'", "not a list of patterns"),
        ("[[label]]\nweight = 1", "has no match"),
        ("[[label]]\nmatch = {a = 1}", "has no match"),
        ("label = 1", "not a list of tables"),
        ("tenant = 1", "not a table"),
        ("[tenant]\nx = 1", "is not a table"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        policy.parse(text)


_JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


@given(st.dictionaries(st.sampled_from(["defaults", "tenant", "label"]), _JSON))
def test_no_document_makes_the_reader_fail_otherwise(document: dict[str, object]) -> None:
    from remora.agent.rules import parse_rules

    with contextlib.suppress(InvalidArgumentError):
        parse_rules(document, "x", "x").terms("a", {"b": "c"})


def test_over_its_rate_a_tenant_is_told_when_to_come_back() -> None:
    now = [0.0]
    quotas = Quotas(rules(), lambda: now[0])
    terms = quotas.terms("a", "a")
    for _ in range(10):
        quotas.admit("a", terms)
    with pytest.raises(ResourceExhaustedError, match="requests_per_s") as refused:
        quotas.admit("a", terms)
    assert retry_after_s(refused.value) == pytest.approx(0.1)
    quotas.admit("b", quotas.terms("b", "b"))
    now[0] += 0.11
    quotas.admit("a", terms)


def test_device_time_is_charged_afterwards_and_debt_is_refused() -> None:
    now = [0.0]
    quotas = Quotas(rules("[defaults]\ndevice_s_per_s = 0.5"), lambda: now[0])
    terms = quotas.terms("a", "a")
    quotas.admit("a", terms)
    quotas.charge("a", terms, 1_500_000)
    with pytest.raises(ResourceExhaustedError, match="device_s_per_s") as refused:
        quotas.admit("a", terms)
    assert retry_after_s(refused.value) == pytest.approx(2.0, abs=0.01)
    now[0] += 2.01
    quotas.admit("a", terms)


def test_a_reload_changes_terms_and_keeps_what_buckets_hold() -> None:
    quotas = Quotas(rules(), lambda: 0.0)
    for _ in range(10):
        quotas.admit("a", quotas.terms("a", "a"))
    quotas.replace(rules(FILE + "priority = 2\n"))
    with pytest.raises(ResourceExhaustedError):
        quotas.admit("a", quotas.terms("a", "a"))
    assert quotas.terms("s", "tenant:acme").share.priority == 2


@given(st.floats(0.1, 1000), st.floats(0.1, 1000), st.lists(st.floats(0, 10), max_size=40))
def test_a_bucket_never_gives_more_than_its_rate(rate: float, most: float, steps: list[float]) -> None:
    bucket, now_s, taken = Bucket(rate, most, 0.0), 0.0, 0.0
    for step in steps:
        now_s += step
        if bucket.wait_s(min(1.0, most), now_s) == 0.0:
            bucket.take(min(1.0, most))
            taken += min(1.0, most)
    assert taken <= most + rate * now_s + 1e-6


def test_policy_check_tells_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(FILE)
    bad.write_text("[defaults]\nwieght = 1\n")
    assert cli.main(["policy", "check", str(good), "--tenant", "acme", "--label", "tier=gold"]) == 0
    assert '[tenant."acme"]' in capsys.readouterr().out
    assert cli.main(["policy", "check", str(bad)]) == 2
    assert "wieght" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "9" * 5000, "x" + ".a" * 900 + " = 1\n#"])
@pytest.mark.parametrize("key", ["[limits]\nconnections", "[defaults]\nweight", "[defaults]\nmodels"])
def test_values_beyond_what_python_can_write_are_refused_in_words(key: str, value: str) -> None:
    text = f"{key}.{value}" if value.startswith("x") else f"{key} = {value}"
    with pytest.raises(InvalidArgumentError, match=r"connections|weight|models|not TOML"):
        policy.parse(text)
