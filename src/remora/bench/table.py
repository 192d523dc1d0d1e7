"""A result as the tables of docs/performance.md, so that what stands there is what was measured.

python -m remora.bench.table bench/results/DATE-HOST.json docs/performance.md

replaces what stands between the two marks of the document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
#: Result -> (what it is, its aim: a ratio, +1 for at least and -1 for at most; 0 for none).
_RESULTS: Mapping[str, tuple[str, float, int]] = {
    "noop": ("Noop through the agent", 4.0, -1),
    "tensor": ("588 KiB tensor to a worker and back", 1.5, -1),
    "classify_tensor": ("classify a tensor", 1.03, -1),
    "classify_picture": ("classify a JPEG", 0.0, 0),
    "classify_tensor_4_clients": ("tensors, 4 client processes", 0.98, 1),
    "classify_tensor_16_clients": ("tensors, 16 client processes", 0.98, 1),
    "classify_picture_4_clients": ("JPEGs, 4 client processes", 0.0, 0),
    "classify_picture_16_clients": ("JPEGs, 16 client processes", 0.0, 0),
}
_YARDSTICKS: Mapping[str, str] = {
    "echo_64": "bare echo of 64 bytes",
    "echo_588k": "bare echo of the same bytes",
    "local_tensor": "the same code in one process",
    "local_picture": "the same code in one process",
}
_PEERS: Mapping[str, tuple[str, float, int]] = {
    "grpc": ("gRPC in Python: protobuf messages, arrays at both ends", 10.0, 1),
    "grpc_bytes": ("gRPC in Python: bytes only, no array, no message", 0.0, 0),
    "triton_http": ("Triton's HTTP client against our door", 0.0, 0),
    "triton_grpc": ("Triton's gRPC client against our door", 0.0, 0),
}


def _figure(figures: Mapping[str, Any]) -> str:
    if "per_second" in figures:
        return f"{figures['per_second']:.0f}/s"
    median_us = figures["median_us"]
    return f"{median_us:.0f} us" if median_us < 100 else f"{median_us / 1000:.3g} ms"


def _aim(ratio: float, aim: float, sign: int) -> str:
    if not sign:
        return ""
    met = ratio >= aim if sign > 0 else ratio <= aim
    return f"at {'least' if sign > 0 else 'most'} {aim:g}, {'met' if met else 'missed'}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(report: Mapping[str, Any]) -> str:
    """Return the results beside their yardsticks, and the tensor beside its peers, in Markdown."""
    results, host = report["results"], report["host"]
    lines = [
        f"{host['time'][:10]}, {host['processor']}, {host['cores']} cores, load {host['load_1min']:g}:",
        *(["", f"{report['note'].capitalize()}."] if report.get("note") else []),
        "",
        _row("result", "measured", "yardstick", "ratio", "aim"),
        "|---|---|---|---|---|",
    ]
    for name, (title, aim, sign) in _RESULTS.items():
        if name in results:
            one = results[name]
            yardstick = one["yardstick"]
            against = f"{_YARDSTICKS.get(yardstick['name'], yardstick['name'])}, {_figure(yardstick)}"
            lines.append(_row(title, _figure(one), against, f"{one['ratio']:.2f}", _aim(one["ratio"], aim, sign)))
    lines += ["", _row("peer, the same 588 KiB tensor", "time", "times ours", "aim"), "|---|---|---|---|"]
    for peer in results.get("tensor", {}).get("peers", ()):
        title, aim, sign = _PEERS.get(peer["name"], (peer["name"], 0.0, 0))
        lines.append(_row(title, _figure(peer), f"{peer['ratio']:.1f}", _aim(peer["ratio"], aim, sign)))
    for peer in results.get("classify_tensor", {}).get("peers", ()):
        lines += ["", f"ONNX Runtime on all cores of one process classifies a tensor in {_figure(peer)}."]
    return "\n".join(lines)


def put(document: str, text: str) -> str:
    """Return the document with other text between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(source: str, document: str) -> None:
    path = Path(document)
    path.write_text(put(path.read_text(), tables(json.loads(Path(source).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
