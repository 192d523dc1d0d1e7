"""Answers that hold until the host boots again: asked once, kept in a small file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def cached(directory: Path, key: str, find: Callable[[], Any]) -> Any:
    """Return the answer kept under `key`, or find it and keep it. Answers are JSON values."""
    path = directory / f"host-{key}.json"
    boot = boot_id()
    try:
        kept = json.loads(path.read_text())
        if kept["boot"] == boot:
            return kept["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never asked, or from before: ask now
    answer = find()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"boot": boot, "answer": answer}))
    draft.replace(path)
    return answer
