"""The example function speaks its line protocol, with any agent behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_agent import FakeAgent

ROOT = Path(__file__).parents[3]


def test_each_picture_gets_a_line_of_json(tmp_path: Path) -> None:
    # Content that looks like a header must not be taken for one.
    pictures = {"a dog.jpg": b"\xff\xd8 picture", "b.png": b"c.jpg 3\nxyz" * 20_000, "empty": b""}
    sent = b"".join(f"{name} {len(data)}\n".encode() + data for name, data in pictures.items())
    with FakeAgent(tmp_path / "accel.sock") as agent:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "src"),
            "REMORA_ADDRESS": f"unix://{tmp_path}/accel.sock",
        }
        function = [sys.executable, str(ROOT / "examples/classify/function.py")]
        done = subprocess.run(function, input=sent, env=environment, capture_output=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr.decode()
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["name"] for answer in answers] == list(pictures)
        assert all(answer["ms"] >= 0 for answer in answers)
        index, name, score = answers[0]["labels"][0]
        assert (type(index), type(name), type(score)) == (int, str, float)
        assert [bytes(request.image) for request in agent.called("Classify")] == list(pictures.values())
