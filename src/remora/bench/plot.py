"""A result as a picture: horizontal bars as SVG, from the JSON of `remora bench`, with nothing but text.

python -m remora.bench.plot bench/results/DATE-HOST.json docs/images
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT = 720, 22, 8, 230, 110


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Return an SVG with one bar for each (name, value, text); the first is ours."""
    most = max(value for _, value, _ in rows) or 1.0
    height = 40 + len(rows) * (_BAR + _GAP)
    size = f'width="{_WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (name, value, text) in enumerate(rows):
        y = 36 + index * (_BAR + _GAP)
        width = max(1, round((_WIDTH - _LEFT - _RIGHT) * value / most))
        colour = "#2f6f9f" if index == 0 else "#b8bec4"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{_LEFT + width + 6}" y="{y + 16}">{escape(text)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def row(name: str, figures: dict[str, Any]) -> tuple[str, float, str]:
    """Return a bar for one set of figures."""
    if "per_second" in figures:
        return name, figures["per_second"], f"{figures['per_second']:.0f}/s"
    return name, figures["median_us"], f"{figures['median_us'] / 1000:.3f} ms"


def plots(report: dict[str, Any]) -> dict[str, str]:
    """Return file name -> SVG for each result."""
    made = {}
    for name, result in report["results"].items():
        others = [result["yardstick"], *result.get("peers", ())]
        rows = [row("Remora", result), *(row(other["name"], other) for other in others)]
        made[f"bench-{name.replace('_', '-')}.svg"] = bars(name.replace("_", " "), rows)
    return made


def main(source: str, directory: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, text in plots(json.loads(Path(source).read_text())).items():
        (Path(directory) / name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
