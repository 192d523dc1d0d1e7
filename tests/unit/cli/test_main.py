"""The `remora` command: what a person sees who mistypes."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil

import pytest

import remora.cli
from remora.cli import main as cli
from remora.errors import NotFoundError


def test_an_unknown_command_names_the_way_to_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["nonsense"]) == 2
    assert "`remora --help`" in capsys.readouterr().err


def test_every_listed_command_has_a_module_and_every_module_is_listed() -> None:
    modules = {module.name for module in pkgutil.iter_modules(remora.cli.__path__)}
    assert set(cli.COMMANDS) <= modules
    for name in cli.COMMANDS:
        module = importlib.import_module(f"remora.cli.{name}")
        assert name == module.NAME
        assert module.HELP


def test_a_full_disk_names_the_place_to_clear(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli, "_run", full)
    monkeypatch.setenv("REMORA_STATE_DIR", "/srv/remora")
    assert cli.main(["ps"]) == 1
    assert "free some space; images, models and uploads lie in /srv/remora" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"remora {name}" in capsys.readouterr().out


def test_an_expected_error_is_one_line_with_its_fix_and_its_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> int:
        raise NotFoundError("no image 'x'", fix="remora image list shows what is there")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["run", "x"]) == NotFoundError.exit_status
    assert capsys.readouterr().err == "remora run: no image 'x' (remora image list shows what is there)\n"


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> int:
        raise NotFoundError("no image 'x'")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(NotFoundError):
        cli.main(["--debug", "run", "x"])
    with pytest.raises(NotFoundError):
        cli.main(["run", "--debug", "x"])


def test_debug_in_the_guests_command_line_is_the_guests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> int:
        raise NotFoundError("no image 'x'")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["run", "x", "tool", "--debug"]) == NotFoundError.exit_status
    assert "no image" in capsys.readouterr().err
