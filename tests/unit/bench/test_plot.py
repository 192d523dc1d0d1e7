"""The pictures of results: one bar for each figure, and well-formed whatever the names hold."""

from __future__ import annotations

from xml.etree import ElementTree

from remora.bench.plot import plots

REPORT = {
    "results": {
        "tensor": {
            "median_us": 480.0,
            "yardstick": {"name": "echo <588k>", "median_us": 220.0},
            "peers": [{"name": "grpc", "median_us": 1850.0}],
        },
        "classify_4_clients": {"per_second": 170.0, "yardstick": {"name": "threads & co", "per_second": 190.0}},
    }
}


def test_every_figure_has_a_bar_and_its_number() -> None:
    made = plots(REPORT)
    assert sorted(made) == ["bench-classify-4-clients.svg", "bench-tensor.svg"]
    texts = "".join(ElementTree.fromstring(made["bench-tensor.svg"]).itertext())
    for expected in ("Remora", "echo <588k>", "grpc", "0.480 ms", "1.850 ms"):
        assert expected in texts
    assert made["bench-tensor.svg"].count("<rect") == 1 + 3
    assert "170/s" in made["bench-classify-4-clients.svg"]
