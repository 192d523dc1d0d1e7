"""One image, one template and one run-time directory for all tests of this folder; at the end nothing may be left."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator

import pytest

import run_leftovers
from microvms import Remora, build_image, wait_until
from remora.sandboxes.leftovers import find_leftovers


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is missing: make system")
    yield from build_image(tmp_path_factory.mktemp("function"), f"test-{secrets.token_hex(4)}")


@pytest.fixture(scope="session")
def remora(image: str) -> Iterator[Remora]:
    # Not below pytest's long temporary directory: socket paths must stay short.
    made = run_leftovers.directory("rr-")
    runtime = made / "r"
    runtime.mkdir()
    os.environ["REMORA_RUNTIME_DIR"] = str(runtime)
    try:
        yield Remora(runtime, image)
        wait_until(lambda: not find_leftovers(runtime), f"no leftovers, but there are {find_leftovers(runtime)}", 20)
    finally:
        del os.environ["REMORA_RUNTIME_DIR"]
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def template(remora: Remora) -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    made = remora("template", "create", "--no-accel", name, remora.image)
    assert made.returncode == 0, made.stderr.decode()
    assert made.stdout.decode().strip() == name
    yield name
    removed = remora("template", "remove", name)
    assert removed.returncode == 0, removed.stderr.decode()


@pytest.fixture
def clean(remora: Remora) -> Iterator[None]:
    """Assert after the test that nothing of its microVMs is left: the next command has swept what was killed."""
    yield
    left = remora("ps", "-aq").stdout.decode().split()
    if left:
        remora("rm", "-f", *left)
    assert left == []
    wait_until(lambda: not find_leftovers(remora.runtime), f"no leftovers: {find_leftovers(remora.runtime)}", 20)
