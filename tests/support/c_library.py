"""Shared libraries for tests, made with the system's C compiler; a test without one is skipped and says so."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

#: What vAccel's functions take; its `arg.h`.
HEADER = """
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
struct vaccel_arg { void *buf; size_t size; int type; uint32_t custom_type_id; bool owned; };
#define F(name) int name(struct vaccel_arg *r, size_t nr, struct vaccel_arg *w, size_t nw)
"""


@dataclass(frozen=True)
class CLibrary:
    path: Path

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


def compile_library(directory: Path, name: str, source: str, options: Sequence[str] = ()) -> CLibrary:
    """Compile C into `lib<name>.so`. `source` follows `HEADER`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    code, path = directory / f"{name}.c", directory / f"lib{name}.so"
    code.write_text(HEADER + source)
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(code), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{name}.c does not compile: {done.stderr}")
    return CLibrary(path)
