"""The configuration file: what it may say, and what the reader is told when it says something else."""

from __future__ import annotations

import contextlib
import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent import policy
from remora.errors import FailedPreconditionError, InvalidArgumentError

DOCS = Path(__file__).parents[3] / "docs" / "agent.md"


def test_an_empty_file_means_the_defaults() -> None:
    assert policy.parse("") == policy.Policy() == policy.load(None)


def test_fleets_are_a_list_of_texts() -> None:
    parsed = policy.parse('[fleets]\nattach = ["kata", "firecracker:/srv/fc/*/v.sock"]\n')
    assert parsed.fleets.attach == ("kata", "firecracker:/srv/fc/*/v.sock")
    for wrong in ('"kata"', "[1]"):
        with pytest.raises(InvalidArgumentError, match="a list of texts"):
            policy.parse(f"[fleets]\nattach = {wrong}\n")


def test_keys_override_their_defaults() -> None:
    parsed = policy.parse("[limits]\nqueue_length_per_tenant = 7\n[workers]\nstop_grace_s = 2\nseccomp = false\n")
    assert parsed.limits.queue_length_per_tenant == 7
    assert parsed.limits.connections == policy.Limits().connections
    assert parsed.workers.stop_grace_s == 2
    assert parsed.workers.seccomp is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits = 3", "not a section"),
        ("[limit]\nx = 1", "no section `limit`"),
        ("[limits]\nconnection = 1", r"no key `connection`.*connections_per_tenant"),
        ("[limits]\nconnections = 0", "at least 1"),
        ("[limits]\nconnections = true", "whole number"),
        ("[limits]\nconnections = 1.5", "whole number"),
        ("[limits]\nmessage_bytes = 100", "at least 4194304"),
        ("[store]\ntotal_bytes = 'many'", "whole number"),
        ("[workers]\nconfinement = 1", "text in quotes"),
        ("[workers]\nconfinement = 'hope'", "bubblewrap"),
        ("[workers]\nstop_grace_s = -1", "above 0"),
        ("[limits", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        policy.parse(text)


def test_a_missing_file_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="does not exist"):
        policy.load(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match="not readable text"):
        policy.load(path)


@given(st.text(max_size=200))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    with contextlib.suppress(InvalidArgumentError):
        assert policy.parse(text).limits.connections > 0


def test_the_operators_page_lists_every_key_with_its_default() -> None:
    page = DOCS.read_text()
    example = page.split("```toml\n", 1)[1].split("```", 1)[0]
    written = tomllib.loads(example)
    for section in fields(policy.Policy):
        if section.name == "rules":  # docs/policy.md has those
            continue
        chosen = asdict(getattr(policy.Policy(), section.name))
        defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}
        defaults.pop("threads", None)  # the machine decides
        shown = written[section.name]
        shown.pop("threads", None)
        assert shown == defaults
