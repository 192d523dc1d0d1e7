"""The demo's report: what was measured, as JSON for machines and as one self-contained page for people."""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

#: What each figure means; printed into the report so that nobody has to guess.
DEFINITIONS = {
    "cold_boot_ms": "start of a microVM from nothing to the first picture classified, milliseconds",
    "cold_start_ms": "the part of it until the function runs and says that it is ready",
    "clone_to_first_answer_ms": "start of a clone of the template to its first picture classified, each started alone",
    "request_ms_p50": "median time of one classification as the function in the microVM sees it, all microVMs at once",
    "request_alone_ms_p50": "the same for the first microVM while no other runs",
    "native_ms_p50": "median time of the same classification in one process on the host, without Remora",
    "labels_equal_native": "the five best labels of every picture are those of the native run, in the same order",
    "guest_devices": "every device that the guest's kernel sees",
    "leftovers": "processes, mounts, sockets and files that outlived the demo",
}


@dataclass(frozen=True)
class Answer:
    """What one microVM said of one photograph."""

    photo: str
    labels: tuple[tuple[int, str, float], ...]  # index, name, score; best first
    start_s: float  # since the demo's clock started
    ms: float  # as the function saw it


@dataclass(frozen=True)
class Photo:
    """A labelled photograph."""

    name: str
    path: Path
    true_index: int
    true_label: str


@dataclass
class MicroVm:
    """One microVM's part."""

    name: str
    kind: str  # "cold" or "clone"
    start_s: float = 0.0
    first_answer_ms: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that the demo saw."""

    model: str
    kvm: bool
    photos: list[Photo]
    native: dict[str, tuple[tuple[int, str, float], ...]]
    native_ms: list[float]
    cold: MicroVm
    cold_start_ms: float
    template_ms: float
    clones: list[MicroVm]
    host: dict[str, Any]
    leftovers: list[str] = field(default_factory=list)

    def correct(self, answers: Iterable[Answer], best: int) -> int:
        """Count the answers that have the true class among their `best` first labels."""
        truth = {photo.name: photo.true_index for photo in self.photos}
        return sum(truth[answer.photo] in [index for index, *_ in answer.labels[:best]] for answer in answers)

    def equal_native(self, microvm: MicroVm) -> bool:
        """Return whether every photograph got the native labels from this microVM."""
        return len(microvm.answers) == len(self.photos) and all(
            [index for index, *_ in answer.labels] == [index for index, *_ in self.native[answer.photo]]
            for answer in microvm.answers
        )

    def as_json(self) -> dict[str, Any]:
        requests = [answer.ms for clone in self.clones for answer in clone.answers]
        return {
            "microvms": len(self.clones),
            "kvm": self.kvm,
            "model": self.model,
            "photos": len(self.photos),
            "answered": [len(clone.answers) for clone in self.clones],
            "top1_correct": [self.correct(clone.answers, 1) for clone in self.clones],
            "top5_correct": [self.correct(clone.answers, 5) for clone in self.clones],
            "labels_equal_native": [self.equal_native(clone) for clone in self.clones],
            "native_top1_correct": sum(self.native[photo.name][0][0] == photo.true_index for photo in self.photos),
            "guest_devices": sorted({device for vm in [self.cold, *self.clones] for device in vm.devices}),
            "cold_boot_ms": round(self.cold.first_answer_ms, 1),
            "cold_start_ms": round(self.cold_start_ms, 1),
            "template_ms": round(self.template_ms, 1),
            "clone_to_first_answer_ms": [round(clone.first_answer_ms, 1) for clone in self.clones],
            "request_ms_p50": _p50(requests),
            "request_alone_ms_p50": _p50([answer.ms for answer in self.cold.answers]),
            "native_ms_p50": _p50(self.native_ms),
            "leftovers": self.leftovers,
            "host": self.host,
            "microvm_details": [asdict(vm) for vm in [self.cold, *self.clones]],
            "definitions": DEFINITIONS,
        }

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write `report.json` and `report.html`; returns their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        as_json, as_html = directory / "report.json", directory / "report.html"
        as_json.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        as_html.write_text(page(self))
        return as_json, as_html


def _p50(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _thumbnail(path: Path) -> str:
    with Image.open(path) as picture:
        picture.draft("RGB", (320, 320))
        small = picture.convert("RGB")
        small.thumbnail((240, 240))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(label: str) -> str:
    return html.escape(label.split(",")[0])


def _card(report: Report, photo: Photo) -> str:
    index, label, score = report.native[photo.name][0]
    answers = [next((a for a in vm.answers if a.photo == photo.name), None) for vm in report.clones]
    same = sum(answer is not None and answer.labels[0][0] == index for answer in answers)
    right = index == photo.true_index
    verdict = "right" if right else f"photograph of: {_short(photo.true_label)}"
    return (
        f'<figure class="{"right" if right else "wrong"}"><img src="{_thumbnail(photo.path)}" alt="">'
        f"<figcaption><b>{_short(label)}</b> <span>{score:.0%}</span>"
        f"<small>{verdict}</small><small>{same} of {len(report.clones)} microVMs say the same</small>"
        "</figcaption></figure>"
    )


def _chart(report: Report) -> str:
    """Draw one row for each microVM: its start, then a bar for each request."""
    rows = [report.cold, *report.clones]
    end_s = max((a.start_s + a.ms / 1000 for vm in rows for a in vm.answers), default=1.0)
    left, width, height = 90, 900, 26
    scale = (width - left - 10) / end_s
    parts = []
    for number, vm in enumerate(rows):
        y = number * height + 6
        parts.append(f'<text x="0" y="{y + 12}">{html.escape(vm.name)}</text>')
        parts.append(
            f'<rect class="boot" x="{left + vm.start_s * scale:.1f}" y="{y}" height="14" '
            f'width="{max(1.0, vm.first_answer_ms / 1000 * scale):.1f}">'
            f"<title>{vm.kind} start to first answer: {vm.first_answer_ms:.0f} ms</title></rect>"
        )
        for answer in vm.answers:
            x, long = left + answer.start_s * scale, max(1.0, answer.ms / 1000 * scale)
            parts.append(
                f'<rect class="call" x="{x:.1f}" y="{y}" height="14" width="{long:.1f}">'
                f"<title>{html.escape(answer.photo)}: {answer.ms:.1f} ms</title></rect>"
            )
    bottom = len(rows) * height + 6
    for second in range(0, int(end_s) + 1, max(1, round(end_s / 12))):
        x = left + second * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" class="tick">{second} s</text>')
    return f'<svg viewBox="0 0 {width} {bottom + 20}" role="img" aria-label="time chart">{"".join(parts)}</svg>'


def _figures(data: dict[str, Any]) -> str:
    clones = data["clone_to_first_answer_ms"]
    tiles = [
        (f"{data['microvms']}", "microVMs, each with its own kernel" + (", on KVM" if data["kvm"] else ", emulated")),
        (f"{min(data['top1_correct'], default=0)} of {data['photos']}", "right at first guess, every microVM"),
        ("all equal" if all(data["labels_equal_native"]) else "they differ", "labels against the native run"),
        (f"{data['cold_boot_ms'] / 1000:.1f} s", "cold boot to first answer"),
        (f"{statistics.median(clones):.0f} ms" if clones else "-", "clone to first answer (median)"),
        (f"{data['request_ms_p50']} ms", f"a request, {data['microvms']} microVMs at once"),
        (f"{data['request_alone_ms_p50']} ms", "a request, one microVM alone"),
        (f"{data['native_ms_p50']} ms", "native, no microVM"),
        (f"{len(data['leftovers'])}", "things left behind"),
    ]
    return "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>" for value, text in tiles)


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2630;--paper:#fbfbf9;--line:#d8dcde;--good:#1b7f5c;--bad:#b3541e;--call:#2f74b5;
--boot:#c9b458}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9eb;--paper:#15191d;--line:#343b41;--good:#52c59a;--bad:#e08a55;
--call:#6aa9e0;--boot:#8d7f3c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:var(--line);
border:1px solid var(--line)}
.tiles div{background:var(--paper);padding:.7rem .9rem}.tiles b{display:block;font-size:1.35rem}
.tiles span,small,.tick{opacity:.75;font-size:.82rem}
.photos{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:1rem}
figure{margin:0;border-top:3px solid var(--good)}figure.wrong{border-color:var(--bad)}
figure img{width:100%;aspect-ratio:1;object-fit:cover;display:block}figcaption small{display:block}
svg{width:100%}svg text{fill:var(--ink);font-size:11px}svg line{stroke:var(--line)}
.boot{fill:var(--boot)}.call{fill:var(--call);stroke:var(--paper);stroke-width:.4}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .6rem .25rem 0;
border-bottom:1px solid var(--line)}code{font-size:.85rem}
"""


def page(report: Report) -> str:
    """Return the whole page: no file, font or script beside it."""
    data = report.as_json()
    devices = "".join(f"<li><code>{html.escape(device)}</code></li>" for device in data["guest_devices"])
    rows = "".join(
        f"<tr><td>{html.escape(vm.name)}</td><td>{vm.first_answer_ms:.0f} ms</td><td>{len(vm.answers)}</td>"
        f"<td>{report.correct(vm.answers, 1)}</td><td>{report.correct(vm.answers, 5)}</td>"
        f"<td>{_p50([a.ms for a in vm.answers])} ms</td><td>{'yes' if report.equal_native(vm) else 'no'}</td></tr>"
        for vm in [report.cold, *report.clones]
    )
    meanings = "".join(
        f"<tr><td><code>{name}</code></td><td>{html.escape(text)}</td></tr>" for name, text in DEFINITIONS.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Remora: microVMs classify on the host's accelerator</title><style>{_STYLE}</style></head><body>
<h1>MicroVMs classify photographs on the host's accelerator</h1>
<p>{data["microvms"]} microVMs, cloned from one template, sent {data["photos"]} photographs each to the node agent,
which ran {html.escape(data["model"])} in a worker. The guests hold no accelerator, no driver and no
machine-learning library.</p>
<div class="tiles">{_figures(data)}</div>
<h2>Time</h2>{_chart(report)}
<p><small>Yellow: start to first answer. Blue: requests. Point at a bar for its time.</small></p>
<h2>MicroVMs</h2><table><tr><th>microVM</th><th>first answer</th><th>answered</th><th>top 1</th><th>top 5</th>
<th>request</th><th>same as native</th></tr>{rows}</table>
<h2>Photographs</h2><div class="photos">{"".join(_card(report, photo) for photo in report.photos)}</div>
<h2>Devices inside a guest</h2><ul>{devices}</ul>
<h2>What the figures mean</h2><table>{meanings}</table>
</body></html>
"""
