"""What the documentation says of speed is made from a result, and says what was missed."""

from __future__ import annotations

from typing import Any

import pytest

from remora.bench.table import BEGIN, END, put, tables

REPORT: dict[str, Any] = {
    "host": {"time": "2026-11-24T14:50:00+00:00", "processor": "AMD EPYC", "cores": 2, "load_1min": 0.1},
    "results": {
        "noop": {"median_us": 84.0, "yardstick": {"name": "echo_64", "median_us": 35.0}, "ratio": 2.4},
        "tensor": {
            "median_us": 440.0,
            "yardstick": {"name": "echo_588k", "median_us": 170.0},
            "ratio": 2.59,
            "peers": [{"name": "grpc", "median_us": 3500.0, "ratio": 7.95}],
        },
        "classify_tensor_4_clients": {
            "per_second": 212.0,
            "yardstick": {"name": "4 threads in one process", "per_second": 215.0},
            "ratio": 0.986,
        },
    },
}


def test_each_result_stands_beside_its_yardstick_and_its_aim() -> None:
    text = tables(REPORT)
    assert "| Noop through the agent | 84 us | bare echo of 64 bytes, 35 us | 2.40 | at most 4, met |" in text
    assert "| 0.44 ms | bare echo of the same bytes, 0.17 ms | 2.59 | at most 1.5, missed |" in text
    assert "| 212/s | 4 threads in one process, 215/s | 0.99 | at least 0.98, met |" in text
    assert "| 3.5 ms | 8.0 | at least 10, missed |" in text


def test_a_document_keeps_what_stands_around_the_figures() -> None:
    assert put(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    with pytest.raises(ValueError, match="the document has no"):
        put("a", "new")
