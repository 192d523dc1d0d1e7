"""What the OpenAPI description allows, and what it does not, never makes the REST face fail by its own fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DESCRIPTION = Path(__file__).parents[3] / "docs" / "oip-openapi.yaml"


def test_schemathesis_finds_no_server_error(agent: Any, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "schemathesis"
    if not program.exists():
        pytest.skip("schemathesis is missing: pip install schemathesis")
    text = DESCRIPTION.read_text()
    any_name = "schema: {type: string, minLength: 1}"
    assert any_name in text
    # A model that is there, or nearly all requests would end at its name.
    (tmp_path / "openapi.yaml").write_text(text.replace(any_name, "schema: {type: string, enum: [identity]}"))
    run = subprocess.run(
        [
            *(str(program), "run", "openapi.yaml", "--url", f"http://127.0.0.1:{agent.oip_port}"),
            *("--checks", "not_a_server_error", "--max-examples", "50", "--phases", "fuzzing", "--seed", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
