"""Picks from this machine's apt sources what serves one suite: base images come from where it gets its packages.

No address of a package host stands in Remora: a machine with a local mirror builds from that mirror, and when nothing
here serves the suite, mmdebstrap's own default for it is used.
"""

from __future__ import annotations

from pathlib import Path


def sources_for(suite: str, apt_dir: Path = Path("/etc/apt")) -> dict[str, str]:
    """Return what serves `suite`: content by file name, `remora.sources` in deb822, `remora.list` in one-line style."""
    stanzas: list[str] = []
    lines: list[str] = []
    parts = apt_dir / "sources.list.d"
    for path in sorted([apt_dir / "sources.list", *parts.glob("*.list"), *parts.glob("*.sources")]):
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".sources":
            stanzas.extend(stanza for stanza in _stanzas(text) if _stanza_serves(stanza, suite))
        else:
            lines.extend(line.strip() for line in text.splitlines() if _line_serves(line, suite))
    found = {"remora.sources": "\n".join(stanzas), "remora.list": "".join(f"{line}\n" for line in lines)}
    return {name: text for name, text in found.items() if text}


def _stanzas(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if not line.startswith("#")]
    blocks = "\n".join(line.rstrip() for line in kept).split("\n\n")
    return [block.strip("\n") + "\n" for block in blocks if block.strip()]


def _stanza_serves(stanza: str, suite: str) -> bool:
    fields = {
        key.strip().lower(): value.split()
        for key, colon, value in (line.partition(":") for line in stanza.splitlines() if not line.startswith(" "))
        if colon
    }
    if "no" in fields.get("enabled", []) or "deb" not in fields.get("types", []):
        return False
    return _serves(fields.get("suites", []), suite) and "main" in fields.get("components", [])


def _line_serves(line: str, suite: str) -> bool:
    words = line.split()
    if len(words) < 4 or words[0] != "deb":
        return False
    after_options = next((n for n, word in enumerate(words) if word.endswith("]")), 0) if words[1][0] == "[" else 0
    rest = words[after_options + 1 :]
    return len(rest) >= 3 and _serves([rest[1]], suite) and "main" in rest[2:]


def _serves(suites: list[str], suite: str) -> bool:
    return any(name == suite or name.startswith(f"{suite}-") for name in suites)
