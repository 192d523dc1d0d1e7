"""`remora image` as a person uses it, as another user than root, and killed in the middle."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_maker import Layout, digest, directory, member, tar
from remora.images.importer import import_image
from remora.images.store import ImageStore

SOURCES = Path(__file__).parents[3] / "src"


def _remora(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "REMORA_STATE_DIR": str(state),
        "PYTHONPATH": str(SOURCES),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "remora.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    made = Layout(tmp_path / "tool")
    lower = tar(directory("etc"), member("etc/x", b"1" * 10_000, uid=5))
    return made.index(made.image([lower], config={"Cmd": ["sh"], "Env": ["A=b"]}))


def test_import_list_show_and_remove(tmp_path: Path, layout: Path) -> None:
    state = tmp_path / "state"
    done = _remora(state, "image", "import", str(layout))
    assert (done.returncode, done.stdout.split()[0]) == (0, "tool:latest")
    listed = json.loads(_remora(state, "image", "list", "--json").stdout)
    assert [image["name"] for image in listed] == ["tool:latest"]
    shown = json.loads(_remora(state, "image", "show", "tool", "--json").stdout)
    assert shown == listed[0]
    assert shown["config"]["env"] == {"A": "b"}
    assert shown["size_bytes"] == sum(layer["size_bytes"] for layer in shown["layers"])
    assert "tool:latest" in _remora(state, "image", "list").stdout
    assert "cmd" in _remora(state, "image", "show", "tool").stdout
    assert _remora(state, "image", "remove", "tool").returncode == 0
    assert json.loads(_remora(state, "image", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["show", "absent"], 3, "no image is called absent:latest"),
        (["remove", "absent"], 3, "no image is called absent:latest"),
        (["import", "/nowhere/at/all"], 3, "there is no /nowhere/at/all to import"),
        (["import", "/etc/passwd"], 2, "no tar archive"),
        (["build", "/etc"], 3, "there is no /etc/remora.toml"),
    ],
)
def test_bad_input_is_one_line_and_a_status(tmp_path: Path, arguments: list[str], status: int, line: str) -> None:
    done = _remora(tmp_path, "image", *arguments)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("remora image: ")
    assert line in done.stderr
    assert done.stdout == ""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter; pytest's own belongs to one."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_who_imports_makes_no_difference(open_directory: Path, layout: Path) -> None:
    shutil.copytree(layout, open_directory / "tool")
    for path in [open_directory / "tool", *(open_directory / "tool").rglob("*")]:
        path.chmod(0o755)
    # A fork, since the interpreter itself may be out of that user's reach.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            import_image(ImageStore(open_directory / "theirs"), open_directory / "tool")
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    theirs = ImageStore(open_directory / "theirs").get("tool")
    ours = import_image(ImageStore(open_directory / "ours"), layout)
    assert theirs.layers[0].stat().st_uid == 65534
    assert theirs.diff_ids == ours.diff_ids
    assert theirs.layers[0].read_bytes() == ours.layers[0].read_bytes()


@pytest.mark.timeout(120)
def test_killed_at_any_moment_the_store_stays_good(tmp_path: Path) -> None:
    made = Layout(tmp_path / "big")
    layers = [tar(member(f"f{number}", random.Random(number).randbytes(6_000_000))) for number in range(3)]
    path = made.index(made.image(layers, compression="none"))
    store = ImageStore(tmp_path / "state/images")
    # The point of death is a number of bytes read, so that it hits the middle of layers, their ends and the record.
    script = (
        "import os, signal, sys, pathlib\n"
        "from remora.images.importer import import_image\n"
        "from remora.images.store import ImageStore\n"
        "left = int(sys.argv[3])\n"
        "def progress(step, done, total):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store, source = (pathlib.Path(argument) for argument in sys.argv[1:3])\n"
        "import_image(ImageStore(store), source, name='big', progress=progress)\n"
    )
    killed = 0
    for moment in range(1, 60, 4):
        done = subprocess.run([sys.executable, "-c", script, str(store.root), str(path), str(moment)], check=False)
        killed += done.returncode == -signal.SIGKILL
        for layer in store.layers_dir.iterdir():
            assert f"sha256:{layer.stem}" in {digest(data) for data in layers}
    assert killed > 5
    image = import_image(store, path, name="big")
    assert len(image.layers) == 3
    assert list(store.tmp_dir.iterdir()) == []
    store.remove("big")
    assert list(store.layers_dir.iterdir()) == []
