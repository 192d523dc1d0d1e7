"""Reads `remora.toml`, the description of a function's image, and names the line and the key of what is wrong in it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.errors import InvalidArgumentError, NotFoundError
from remora.images.model import ImageConfig, full_name

FILE_NAME = "remora.toml"
VARIANTS = ("minimal", "minbase")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"(debian|ubuntu):([a-z]+)")

#: section -> key -> kind; a kind names the check below and, in errors, what is expected.
_KEYS: dict[str, dict[str, str]] = {
    "image": {"name": "string", "base": "string", "variant": "string", "packages": "list of strings"},
    "python": {"requirements": "string", "target": "string"},
    "run": {
        "entrypoint": "list of strings",
        "cmd": "list of strings",
        "env": "table of strings",
        "workdir": "string",
        "user": "string",
        "stop_signal": "string",
        "ports": "list of strings",
    },
    "files": {},
    "labels": {},
}


@dataclass(frozen=True)
class Recipe:
    """A checked `remora.toml`. `suite` is set for a base made of packages, else `base` is an image or `scratch`."""

    directory: Path
    name: str
    base: str
    suite: str | None
    variant: str
    packages: tuple[str, ...]
    files: Mapping[str, str]
    requirements: str | None
    target: str | None
    config: ImageConfig = field(default_factory=ImageConfig)


def load_recipe(directory: Path) -> Recipe:
    """Read and check `remora.toml` in `directory`.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: its TOML, a key or a value is wrong; the message has the line.
    """
    path = directory / FILE_NAME
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no {path}", fix="see docs/images.md for what to write into it") from None
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path} is no UTF-8 text: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"{path} is no valid TOML: {error}") from error
    return _Checker(path, text, values).recipe()


class _Checker:
    def __init__(self, path: Path, text: str, values: dict[str, Any]) -> None:  # Any: parsed TOML, checked here
        self._path = path
        self._lines = text.splitlines()
        self._values = values

    def recipe(self) -> Recipe:
        for section in self._values:
            self._known("", section, _KEYS)
            if not isinstance(self._values[section], dict):
                raise self._error("", section, f"{section} must be a section: [{section}]")
        for section in ("image", "python", "run"):
            for key, value in self._section(section).items():
                self._known(section, key, _KEYS[section])
                self._typed(section, key, value, _KEYS[section][key])
        for section in ("files", "labels"):
            for key, value in self._section(section).items():
                self._typed(section, key, value, "string")
        image, run, python = self._section("image"), self._section("run"), self._section("python")
        base = image.get("base")
        if not base:
            raise InvalidArgumentError(
                f"{self._path}: [image] needs a base: host, debian:SUITE, ubuntu:SUITE, scratch or an image's name"
            )
        suite = _host_suite(self._path) if base == "host" else (m[2] if (m := _SUITE.fullmatch(base)) else None)
        self._check_image(image, suite)
        self._check_files()
        target = python.get("target")
        if target is not None and not target.startswith("/"):
            raise self._error("python", "target", f"the target {target!r} is not absolute")
        if target is not None and "requirements" not in python:
            raise self._error("python", "target", "there is a target but no requirements file")
        workdir = run.get("workdir", "/")
        if not workdir.startswith("/"):
            raise self._error("run", "workdir", f"the workdir {workdir!r} is not absolute")
        return Recipe(
            directory=self._path.parent,
            name=full_name(image.get("name", self._default_name())),
            base=base,
            suite=suite,
            variant=image.get("variant", VARIANTS[0]),
            packages=tuple(sorted(set(image.get("packages", ())))),
            files=dict(self._section("files")),
            requirements=python.get("requirements"),
            target=target,
            config=ImageConfig(
                entrypoint=tuple(run.get("entrypoint", ())),
                cmd=tuple(run.get("cmd", ())),
                env=dict(run.get("env", {})),
                cwd=workdir,
                user=run.get("user", ""),
                labels=dict(self._section("labels")),
                exposed_ports=tuple(run.get("ports", ())),
                stop_signal=run.get("stop_signal", "SIGTERM"),
            ),
        )

    def _check_image(self, image: Mapping[str, Any], suite: str | None) -> None:
        if "name" in image:
            try:
                full_name(image["name"])
            except InvalidArgumentError as error:
                raise self._error("image", "name", str(error)) from error
        for key in ("packages", "variant"):
            if suite is None and key in image:
                raise self._error("image", key, f"{key} needs a base of packages: host, debian:SUITE or ubuntu:SUITE")
        if (variant := image.get("variant", VARIANTS[0])) not in VARIANTS:
            raise self._error("image", "variant", f"{variant!r} is no variant; allowed are {' and '.join(VARIANTS)}")
        for package in image.get("packages", ()):
            if not _PACKAGE.fullmatch(package):
                raise self._error("image", "packages", f"{package!r} is no package name")

    def _check_files(self) -> None:
        root = self._path.parent.resolve()
        for destination, source in self._section("files").items():
            if not destination.startswith("/") or ".." in destination.split("/"):
                raise self._error("files", destination, f'{destination!r} is not absolute; write "/PATH" = "{source}"')
            if not (root / source).resolve().is_relative_to(root):
                raise self._error("files", destination, f"{source!r} is outside of {root}")
            if not (root / source).exists():
                raise self._error("files", destination, f"there is no {source!r} in {root}")

    def _section(self, name: str) -> dict[str, Any]:
        section: dict[str, Any] = self._values.get(name, {})
        return section

    def _known(self, section: str, key: str, allowed: Mapping[str, object]) -> None:
        if key in allowed:
            return
        close = difflib.get_close_matches(key, allowed, 1)
        what = f"[{section}] has no key {key!r}" if section else f"there is no section [{key}]"
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise self._error(section, key, f"{what}; {hint}allowed are {', '.join(allowed)}")

    def _typed(self, section: str, key: str, value: object, kind: str) -> None:
        good = {
            "string": isinstance(value, str),
            "list of strings": isinstance(value, list) and all(isinstance(item, str) for item in value),
            "table of strings": isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
        }[kind]
        if not good:
            raise self._error(section, key, f"[{section}] {key} must be a {kind}, not {value!r}")

    def _error(self, section: str, key: str, message: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self._path} line {self._line(section, key)}: {message}")

    def _line(self, section: str, key: str) -> int:
        """The line of a key, or of the section when the key is written in another way than `key =`."""
        now, fallback = "", 1
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[+\s*([^\]\s]+)\s*\]", line):
                now = header[1].split(".")[0]
                if now == (section or key) or header[1] == f"{section}.{key}":
                    fallback = number
                if header[1] in (key if not section else "", f"{section}.{key}"):
                    return number
            elif now == section and re.match(rf"""\s*(["']?){re.escape(key)}\1\s*[.=]""", line):
                return number
        return fallback

    def _default_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self._path.parent.resolve().name.lower()).strip("-") or "function"


def _host_suite(path: Path) -> str:
    values: dict[str, str] = {}
    try:
        for line in Path("/etc/os-release").read_text().splitlines():
            key, _, value = line.partition("=")
            values[key] = value.strip("\"'")
    except FileNotFoundError:
        pass  # the error below says it all
    if values.get("ID") not in ("debian", "ubuntu") or not values.get("VERSION_CODENAME"):
        raise InvalidArgumentError(
            f'{path}: the base is "host", but this machine runs neither Debian nor Ubuntu',
            fix='write base = "debian:bookworm"',
        )
    return values["VERSION_CODENAME"]
