"""Checks what documentation gets wrong first: links, names of commands, and dependencies nobody explained."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from remora.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
_COMMAND = re.compile(r"`remora ([a-z]+)")
_FENCED_COMMAND = re.compile(r"^\s*(?:\$ )?remora ([a-z]+)", re.MULTILINE)
_NAME = re.compile(r"^[A-Za-z0-9-]+")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))]


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
            yield f"{page.relative_to(ROOT)}: link to '{target}', which does not exist"


def unknown_commands(page: Path, text: str) -> Iterator[str]:
    for name in {*_COMMAND.findall(text), *_FENCED_COMMAND.findall(text)}:
        if name not in COMMANDS and name != "is":
            yield f"{page.relative_to(ROOT)}: there is no command 'remora {name}'"


def unexplained_dependencies() -> Iterator[str]:
    explained = (ROOT / "docs/dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            match = _NAME.match(requirement)
            if match and match[0] != "remora" and match[0] not in explained:
                yield f"docs/dependencies.md: '{match[0]}' of the extra '{extra}' is not explained"


def unlinked_pages() -> Iterator[str]:
    index = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        if f"docs/{page.name}" not in index:
            yield f"README.md: does not link docs/{page.name}"


def main() -> int:
    problems = [*unexplained_dependencies(), *unlinked_pages()]
    for page in pages():
        text = page.read_text()
        problems += [*broken_links(page, text), *unknown_commands(page, text)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages())} pages checked, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
