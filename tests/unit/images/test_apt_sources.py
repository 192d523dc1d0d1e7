"""Which of a machine's apt sources serve a suite."""

from __future__ import annotations

from pathlib import Path

from remora.images.apt_sources import sources_for

_DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.invalid/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://disabled.invalid/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://other.invalid/debian
Suites: trixie
Components: main
"""
_LINES = """\
deb [arch=amd64 signed-by=/k.gpg] http://line.invalid/debian bookworm main contrib
deb http://security.invalid/debian-security bookworm-security main
deb-src http://line.invalid/debian bookworm main
# deb http://comment.invalid/debian bookworm main
deb http://tool.invalid/apt bookworm stable
deb http://next.invalid/debian bookwormish main
deb
"""


def test_only_what_serves_the_suite_is_taken(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(_LINES)
    (tmp_path / "sources.list.d/debian.sources").write_text(_DEB822)
    (tmp_path / "sources.list.d/old.list.disabled").write_text(_LINES)
    found = sources_for("bookworm", tmp_path)
    assert sorted(found) == ["remora.list", "remora.sources"]
    assert found["remora.list"].count("\n") == 2
    assert "line.invalid" in found["remora.list"]
    assert "security.invalid" in found["remora.list"]
    assert "mirror.invalid" in found["remora.sources"]
    for absent in ("disabled.invalid", "other.invalid", "comment"):
        assert absent not in found["remora.sources"]


def test_a_machine_without_the_suite_has_no_sources_for_it(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(_LINES)
    assert sources_for("noble", tmp_path) == {}
    assert sources_for("noble", tmp_path / "absent") == {}
